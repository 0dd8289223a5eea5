"""The file in which a rank leaves why it ended."""

from __future__ import annotations

import json

import pytest

from megalard import cli
from megalard.error_file import PRINTS_REASONS, Failure, failure_of, leave_reason
from megalard.errors import DiskError, UserError


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file that torchrun gives a rank."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def test_a_reason_is_read_back(file):
    leave_reason("the disk is full", is_bad_input=False)
    assert failure_of(str(file)) == Failure("the disk is full", False)
    # torchrun reads its part of the file.
    message = json.loads(file.read_text())["message"]
    assert message["message"] == "the disk is full"
    assert int(message["extraInfo"]["timestamp"]) > 1_600_000_000


def test_the_first_reason_stays(file):
    leave_reason("first", is_bad_input=True)
    leave_reason("second", is_bad_input=False)
    assert failure_of(str(file)) == Failure("first", True)


def test_outside_torchrun_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    leave_reason("lost", is_bad_input=True)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_not_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "such" / "folder"))
    leave_reason("lost", is_bad_input=True)


@pytest.mark.parametrize("content", [None, "", "{ cut", "[]", "{}", '{"megalard": 3}'])
def test_a_file_without_a_reason_is_no_reason(content, tmp_path):
    path = tmp_path / "error.json"
    if content is not None:
        path.write_text(content)
    assert failure_of(str(path)) == Failure()


@pytest.mark.parametrize(
    ("error", "is_bad_input"), [(UserError("a wrong key"), True), (DiskError("a wrong key"), False)]
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_command_leaves_its_reason_on_every_rank(rank, error, is_bad_input, file, monkeypatch):
    """A disk may work again, and another start succeed; bad input stays bad."""

    def fail():
        raise error

    monkeypatch.setenv("RANK", rank)
    assert cli.run(fail) == 1
    assert failure_of(str(file)) == Failure("a wrong key", is_bad_input)


@pytest.mark.parametrize(
    ("error", "restarts", "is_printed"),
    [
        (UserError("a wrong key"), ("0", "3"), False),
        (DiskError("the disk is full"), ("0", "3"), True),
        (DiskError("the disk is full"), ("3", "3"), False),
    ],
)
def test_a_sentence_that_the_launcher_prints_is_not_printed_by_the_rank(
    error, restarts, is_printed, tmp_path, monkeypatch, capsys
):
    """Bad input is not tried again; after another error the launcher prints the last try's."""

    def fail():
        raise error

    (tmp_path / "attempt").mkdir()
    file = tmp_path / "attempt" / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts[0])
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts[1])
    sentence = f"megalard: error: {error}\n"
    assert cli.run(fail) == 1
    assert capsys.readouterr().err == sentence, "torchrun itself prints no sentence"
    file.unlink()
    (tmp_path / PRINTS_REASONS).touch()
    assert cli.run(fail) == 1
    assert capsys.readouterr().err == (sentence if is_printed else "")
