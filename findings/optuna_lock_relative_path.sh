#!/bin/sh
# Optuna 5.0.0: JournalFileBackend with a relative path and the lock of a process that was killed.
#
# The lock beside the journal is a symbolic link, and it is given up after 30 seconds (grace_period) in which the time
# of what it leads to does not change. It leads to the journal's path as it was given, but a symbolic link's target is
# relative to the link's own folder: for "study/journal.log" it is "study/study/journal.log", which does not exist. So
# the lock has no age, and no later process ever gives it up, unless the path is absolute or in the current folder.
#
# Seen: "relative: the lock leads nowhere", "absolute: the lock leads to the journal".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "optuna==5.0.0"
mkdir "$folder/study"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
import sys

from optuna.storages.journal import JournalFileSymlinkLock

leads = {}
for name, path in (("relative", "study/journal.log"), ("absolute", os.path.abspath("study/journal.log"))):
    open(path, "ab").close()
    lock = JournalFileSymlinkLock(path)
    lock.acquire()
    leads[name] = os.path.exists(path + ".lock")
    lock.release()
    print(f"{name}: the lock leads {'to the journal' if leads[name] else 'nowhere'}")
sys.exit(leads != {"relative": False, "absolute": True})
PYTHON
