"""Cue localization as in the released code's README."""

import sys

from calm.released_commands.evaluate import cue_location
from calm.released_commands.flags import run

if __name__ == "__main__":
    sys.exit(run("eval_cue_location.py", cue_location))
