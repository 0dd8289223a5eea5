"""Small files of users: regular files only, of bounded size, with errors in words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megalard.errors import UserError
from megalard.files.reading import cannot_read, check_regular, read_json, read_text
from tests.command_line import user_error


def test_only_regular_files_are_read(tmp_path):
    """A named pipe without a writer would make the reader wait forever."""
    pipe, folder, file = tmp_path / "pipe", tmp_path / "folder", tmp_path / "file"
    os.mkfifo(pipe)
    folder.mkdir()
    file.write_text("{}")
    check_regular(file)
    for function in (check_regular, read_json):
        assert user_error(function, pipe) == (
            f"{pipe} is not a regular file: a regular file is needed there"
        )
        assert user_error(function, folder) == (
            f"{folder} is a directory: a regular file is needed there"
        )
    assert "is not a regular file" in user_error(read_text, pipe, 100)
    (tmp_path / "link").symlink_to(file)
    assert read_json(tmp_path / "link") == {}


def test_devices_are_not_regular_files():
    assert "is not a regular file" in user_error(check_regular, Path("/dev/zero"))


def test_text_has_a_limit(tmp_path):
    file = tmp_path / "text"
    file.write_text("é" * 10)
    assert read_text(file, 20) == "é" * 10
    assert user_error(read_text, file, 19, "note") == (
        f"the note {file} has more than 19 bytes: give a smaller file"
    )


def test_a_missing_file_and_a_bad_path_are_named(tmp_path):
    missing = tmp_path / "missing"
    assert user_error(read_text, missing, 9, "note") == (
        f"cannot read the note {missing}: No such file or directory"
    )
    assert "is not a path" in user_error(read_text, tmp_path / "a\0b", 9)
    with pytest.raises(FileNotFoundError):
        read_json(missing)


def test_text_that_is_not_utf_8_is_a_unicode_error(tmp_path):
    (tmp_path / "text").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "text", 9)


@pytest.mark.parametrize("content", [b"{ cut", b"", b"\xff", b"[" * 100_000])
def test_bad_json_is_a_value_error(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(tmp_path / "x.json")
    assert not isinstance(caught.value, UserError)


def test_json_has_a_limit(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("[1, 2]")
    assert read_json(file) == [1, 2]
    assert user_error(read_json, file, 5) == (f"{file} has more than 5 bytes: give a smaller file")


def test_the_error_of_the_system_has_its_fix():
    denied = cannot_read("/x", OSError(errno.EACCES, "Permission denied"))
    assert str(denied) == "cannot read /x: Permission denied; check its permissions and its disk"
    files = cannot_read("/x", OSError(errno.EMFILE, "Too many open files"))
    assert str(files).endswith("raise the limit of this shell with ulimit -n")
