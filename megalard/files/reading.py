"""Read small files that a user names: regular files only, of bounded size, with errors in words."""

from __future__ import annotations

import contextlib
import errno
import json
import stat
from pathlib import Path
from typing import Any

from megalard.errors import DiskError, UserError

# Larger than every JSON file of a model; an index of 200,000 tensors takes 20 MB.
_JSON_BYTES = 256 * 2**20


def cannot_read(path: str | Path, error: OSError) -> UserError:
    """Return the error about a file or directory that the operating system does not let us read."""
    fix = "check its permissions and its disk"
    if error.errno == errno.EMFILE:
        fix = "raise the limit of this shell with ulimit -n"
    return DiskError(f"cannot read {path}: {error.strerror or error}; {fix}")


def check_regular(path: str | Path) -> None:
    """Refuse a path that is not a regular file, such as a named pipe, on which reading could wait.

    Raises:
        UserError: the path is not a regular file.
        OSError: there is nothing at the path, or its kind cannot be determined.
    """
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise UserError(f"{path} is {kind}: a regular file is needed there")


def check_if_regular(path: str | Path) -> None:
    """Refuse a path at which there is something that is not a regular file.

    Raises:
        UserError: as ``check_regular``; a path at which there is nothing is accepted.
    """
    with contextlib.suppress(OSError):
        check_regular(path)


def read_text(path: Path, limit: int, what: str = "file") -> str:
    """Return the text of a UTF-8 file of at most ``limit`` bytes.

    Raises:
        UserError: the file is missing, unreadable, not regular or too large.
        UnicodeDecodeError: the file is not UTF-8.
    """
    try:
        if not path.is_dir():
            check_regular(path)
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from None
    except ValueError as error:  # a NUL character in the path
        raise UserError(f"{str(path)!r} is not a path: {error}") from None
    if len(content) > limit:
        raise UserError(f"the {what} {path} has more than {limit} bytes: give a smaller file")
    return content.decode("utf-8")


def read_json(path: Path, limit: int = _JSON_BYTES) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be read, is not regular, or is too large.
        ValueError: the file is not JSON, or is nested too deep.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise cannot_read(path, error) from None
    if len(content) > limit:
        raise UserError(f"{path} has more than {limit} bytes: give a smaller file")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
