"""Lock files: one process at a time, released by closing and by the end of the process."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import time

import pytest

from megalard.files import locks
from megalard.files.locks import hold_lock
from tests.command_line import user_error


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Do not wait long for a lock that is held."""
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.2)


def test_a_second_process_is_refused_until_the_first_closes_the_file(tmp_path):
    path = tmp_path / "lock"
    first = hold_lock(path, "the place")
    assert user_error(hold_lock, path, "the place") == (
        "another process is writing the place: wait for it, stop it, or choose another place"
    )
    first.close()
    hold_lock(path, "the place").close()


def _hold_forever(path, ready) -> None:
    file = hold_lock(path, "there")
    ready.set()
    time.sleep(600)
    file.close()


def test_the_end_of_a_process_releases_its_lock(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold_forever, args=(tmp_path / "lock", ready), daemon=True)
    process.start()
    try:
        assert ready.wait(60)
        assert "another process is writing" in user_error(hold_lock, tmp_path / "lock", "there")
        os.kill(process.pid, signal.SIGKILL)
        monkeypatch.setattr(locks, "_PATIENCE_S", 60)
        hold_lock(tmp_path / "lock", "there").close()
    finally:
        process.kill()
        process.join()


def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_lock(tmp_path / "lock", "there") as file:
        assert not file.closed


def test_a_lock_file_that_cannot_be_made_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        hold_lock(tmp_path / "no" / "lock", "there")


def test_the_content_of_the_file_stays(tmp_path):
    (tmp_path / "lock").write_text("a note")
    hold_lock(tmp_path / "lock", "there").close()
    assert (tmp_path / "lock").read_text() == "a note"
