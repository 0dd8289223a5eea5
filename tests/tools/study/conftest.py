"""A corpus of the standard library that the tests of a session share."""

from __future__ import annotations

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
    """Python and prose from the standard library, for windows of 512 tokens."""
    if not (stdlib / "idlelib").is_dir():
        pytest.skip("parts of the standard library are in packages of their own here")
    output = tmp_path_factory.mktemp("corpus") / "out"
    options = ("--megabytes", 1, "--vocab-size", 600, "--native-window", 512, "--workers", 1)
    assert tool("study.corpus")("--output", output, "--roots", stdlib, *options) == 0
    return output
