"""Train as the released code's main.py: ``python main.py --experiment_name=NAME --architecture=resnet50 ...``."""

import sys

from calm.released_commands.flags import run
from calm.released_commands.train import main

if __name__ == "__main__":
    sys.exit(run("main.py", main))
