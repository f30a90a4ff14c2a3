"""Lightning inside a library: no tips, no advice, and the process left as it was found."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["well_behaved_lightning"]

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
_NOT_APPLICABLE = (
    ".*LeafSpec.* is deprecated.*",  # Lightning's own use of PyTorch
    ".*does not have many workers.*",  # a choice of the user's
    ".*GPU available but not used.*",  # the same
    ".*it is recommended to use .*single device.*",  # each test image is in exactly one process
    ".*number of training batches .* is smaller than the logging interval.*",  # nothing is logged through Lightning
)


@contextmanager
def well_behaved_lightning() -> Iterator[None]:
    """Silence messages that do not apply; afterwards restore the levels of Lightning's loggers, PyTorch's choice of
    deterministic algorithms, and Ctrl-C.

    Raises:
        KeyboardInterrupt: as it happened. (Lightning would end the process with code 1.)
        SystemExit: with 143 after SIGTERM, as a process that is ended by it. (Lightning would end with 0.)
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    interrupt = signal.getsignal(signal.SIGINT)
    deterministic = torch.are_deterministic_algorithms_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for pattern in _NOT_APPLICABLE:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    except SIGTERMException as stop:
        raise SystemExit(128 + signal.SIGTERM) from stop
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt from stop
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
