"""The folder of the libraries' caches is the user's own, or another is taken."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from calm.files import caches_among_temporary_files


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MPLCONFIGDIR", "")  # so that what a test sets is taken back
    monkeypatch.delenv("MPLCONFIGDIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"calm-{os.getuid()}"


def test_one_folder_serves_all_commands_of_a_user(mine, monkeypatch):
    caches_among_temporary_files()
    assert os.environ["MPLCONFIGDIR"] == str(mine)
    assert mine.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("MPLCONFIGDIR")
    caches_among_temporary_files()
    assert os.environ["MPLCONFIGDIR"] == str(mine)


def test_a_folder_that_others_may_write_and_a_link_are_not_trusted(mine, monkeypatch, tmp_path):
    mine.mkdir()
    mine.chmod(0o777)
    caches_among_temporary_files()
    assert os.environ["MPLCONFIGDIR"].startswith(f"{mine}-")
    mine.rmdir()
    (tmp_path / "elsewhere").mkdir()
    mine.symlink_to(tmp_path / "elsewhere")
    monkeypatch.delenv("MPLCONFIGDIR")
    caches_among_temporary_files()
    assert os.environ["MPLCONFIGDIR"].startswith(f"{mine}-")


def test_what_the_user_has_chosen_stays(mine, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", "mine")
    caches_among_temporary_files()
    assert os.environ["MPLCONFIGDIR"] == "mine"
    assert not mine.exists()


def test_without_a_place_to_write_nothing_is_set(mine, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    caches_among_temporary_files()
    assert "MPLCONFIGDIR" not in os.environ
