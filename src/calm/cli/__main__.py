"""``python -m calm.cli``: the command line, where the ``calm`` script is not on the path (torchrun)."""

import sys

from calm.cli import main

sys.exit(main())
