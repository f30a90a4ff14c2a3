"""How many cases the fault and fuzz suites try: few with every test run, all with `make stress` (CALM_STRESS=full)."""

import os

FULL = os.environ.get("CALM_STRESS") == "full"
"""True if the suites run in full."""


def count(*, reduced: int, full: int) -> int:
    """The number of cases of a test: `reduced` with every test run, `full` under CALM_STRESS=full."""
    return full if FULL else reduced
