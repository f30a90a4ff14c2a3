"""Remove-and-classify as in the released code's README; its own repository calls it eval_remove_classify.py."""

import sys

from calm.released_commands.evaluate import remove_and_classify
from calm.released_commands.flags import run

if __name__ == "__main__":
    sys.exit(run("eval_pixel_perturb.py", remove_and_classify))
