"""Cue localization as in the released code's README."""

import sys

from calm.released_commands.cue_location import main
from calm.released_commands.terminal import run

if __name__ == "__main__":
    sys.exit(run("eval_cue_location.py", main))
