"""Progress bars: on rank 0, and only on a terminal."""

from __future__ import annotations

import re

import pytest

from megalard.parallel.mesh import Axis
from megalard.progress import byte_bar, token_bar


@pytest.fixture
def terminal(monkeypatch):
    """Let stderr pass for a terminal."""
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(variable, "1")


def printed(capsys) -> str:
    """Return what was printed on stderr, without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)


def test_bytes_are_counted_up_to_the_total(terminal, capsys):
    with byte_bar("reading", 4096) as advance:
        advance(1024)
        advance(1024)
    text = printed(capsys)
    # The end of the block completes the bar: the headers of files are not part of the total.
    assert "reading" in text and "4.0/4.0 KiB" in text


def test_tokens_have_the_name_of_what_is_measured(terminal, capsys):
    with token_bar(100) as advance:
        advance("teacher", 0)
        advance("student", 100)
    text = printed(capsys)
    assert "student" in text and "100%" in text


def test_nothing_is_drawn_where_there_is_no_terminal(capsys):
    with byte_bar("reading", 4096) as advance:
        advance(4096)
    assert "reading" not in printed(capsys)


def test_other_ranks_draw_nothing(terminal, capsys):
    with byte_bar("reading", 4096, Axis(None, 1, 2)) as advance:
        advance(4096)
    assert "reading" not in printed(capsys)
