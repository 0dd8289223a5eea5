"""A corpus of the standard library that the tests of a session share."""

from __future__ import annotations

import fcntl
import sysconfig
from pathlib import Path

import pytest

from tests.command_line import tool


@pytest.fixture(scope="session")
def stdlib() -> Path:
    """The standard library of the running Python."""
    return Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, stdlib) -> Path:
    """Python and prose from the standard library, for windows of 512 tokens.

    The processes of a session make it once; its tests only read it.
    """
    if not (stdlib / "idlelib").is_dir():
        pytest.skip("parts of the standard library are in packages of their own here")
    base = tmp_path_factory.getbasetemp()
    # Each process of pytest-xdist has a folder of its own in that of the session.
    session = base.parent if base.name.startswith("popen-") else base
    output, complete = session / "study-corpus", session / "study-corpus-is-complete"
    options = ("--megabytes", 1, "--vocab-size", 600, "--native-window", 512, "--workers", 1)
    with open(session / "study-corpus-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            assert tool("study.corpus")("--output", output, "--roots", stdlib, *options) == 0
            complete.touch()
    return output
