"""From the archives that data sets are published as to folders that this package reads."""

from calm.data.prepare.command import prepare
from calm.data.prepare.staging import Prepared

__all__ = ["Prepared", "prepare"]
