"""The same as eval_pixel_perturb.py, under the name that the released repository gave it."""

import sys

from calm.released_commands.evaluate import remove_and_classify
from calm.released_commands.flags import run

if __name__ == "__main__":
    sys.exit(run("eval_remove_classify.py", remove_and_classify))
