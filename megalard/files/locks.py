"""Files that say that a process is writing somewhere, held until it ends, however it ends."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

from megalard.errors import UserError

# for what a process that was killed has started, and that has its files a moment longer
_PATIENCE_S = 5.0


def hold(path: Path, what: str) -> IO[bytes]:
    """The file, made if need be and locked for this process until it is closed.

    Where the disk keeps no locks (some network file systems) it is held without one.

    Args:
        what: what is being written, for the sentence.

    Raises:
        UserError: another process holds it.
        OSError: it cannot be opened.
    """
    file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    patience = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() < patience:
                time.sleep(0.1)
                continue
            file.close()
            raise UserError(
                f"another process is writing {what}: wait for it, stop it, or choose another place"
            ) from None
        except OSError:
            return file
