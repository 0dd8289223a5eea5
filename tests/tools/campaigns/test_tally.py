"""What is bad is listed on one line with its seed, and all is counted."""

from __future__ import annotations

import json

from tools.campaigns.tally import Outcome, Tally


def test_what_is_bad_is_listed_on_one_line_and_gives_status_1(capsys):
    tally = Tally()
    tally.add(1, Outcome("refused", True, "a case", "a sentence", events={"kills": 2}))
    tally.add(2, Outcome("refused", True, "a case", "a sentence", events={"kills": 3}))
    assert tally.report() == 0
    assert "       5 kills" in capsys.readouterr().out
    tally.add(3, Outcome("traceback", False, "a\nb", "x\x1b[31m"))
    assert capsys.readouterr().out == "traceback: seed 3: a\\nb: x\\x1b[31m\n"
    assert tally.report() == 1
    assert capsys.readouterr().out == (
        "       5 kills\n       2 refused\n       1 traceback\n"
        "       3 cases, of which 1 are not as they should be\n"
    )
    tally.add(4, Outcome("read by us alone", True, "a case", is_shown=True))
    assert capsys.readouterr().out == "read by us alone: seed 4: a case: \n"


def test_counts_are_written_as_json(tmp_path):
    tally = Tally()
    tally.add(1, Outcome("refused", True, "a case", "a sentence", events={"kills": 2}))
    tally.add(3, Outcome("traceback", False, "a\nb", "x"))
    tally.write(tmp_path / "t.json", {"seed": 1})
    assert json.loads((tmp_path / "t.json").read_text()) == {
        "seed": 1,
        "events": {"kills": 2},
        "outcomes": {"refused": 1, "traceback": 1},
        "bad": [{"seed": 3, "kind": "traceback", "case": "a\nb", "detail": "x"}],
    }
