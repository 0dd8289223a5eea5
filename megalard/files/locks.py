"""Lock files: a process holds one while it writes somewhere, until the process ends."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

from megalard.errors import UserError
from megalard.files.reading import check_if_regular, check_regular

# A process that was killed may have started others that keep its files open a moment longer.
_PATIENCE_S = 5.0


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of a lock file; True also if that cannot be determined."""
    try:
        check_regular(path)
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except (OSError, UserError):
        return True


def hold_lock(path: Path, target: str) -> IO[bytes]:
    """Create the lock file if need be, lock it for this process, and return it open.

    Closing the file releases the lock; the end of the process closes it. Some network file systems
    keep no locks. There the file is returned without one.

    Args:
        path: the lock file.
        target: what is being written, for the error message.

    Raises:
        UserError: another process holds the lock, or the path is not a regular file.
        OSError: the file cannot be opened.
    """
    check_if_regular(path)
    file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            file.close()
            raise UserError(
                f"another process is writing {target}: wait for it, stop it, or choose another "
                "place"
            ) from None
        except OSError:
            return file
