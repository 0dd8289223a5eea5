"""What a run prints is printed by rank 0 alone."""

from __future__ import annotations

from megalard.reporter import Reporter


def test_rank_0_prints(capsys):
    reporter = Reporter(is_rank_0=True)
    reporter.line("a line")
    reporter.warning("a doubt")
    printed = capsys.readouterr()
    assert printed.out == "a line\nwarning: a doubt\n"
    assert printed.err == ""


def test_other_ranks_are_silent(capsys):
    reporter = Reporter(is_rank_0=False)
    reporter.line("a line")
    reporter.warning("a doubt")
    assert capsys.readouterr() == ("", "")
