"""The tables of the study: literal numbers from results that nobody measured."""

from __future__ import annotations

import json
import math

import pytest

from megalard.errors import UserError
from tools.study.pretrained.methods import METHODS
from tools.study.pretrained.report import Number, best_rates, groups, table, write_report
from tools.study.pretrained.run import Run, validation_loss

SHORT, LONG = ("16", "64"), "256"


def text(loss: float, agreement: float = 0.5, far: float = 2.0) -> dict:
    """Results of one domain: short text of a loss, and a long window."""
    lengths = {length: {"loss": loss, "agreement": agreement} for length in SHORT}
    return {**lengths, LONG: {"loss": far, "agreement": 0}, "by_position": [9.0, far]}


def measured(loss: float, right: str, passkey: float = 0.5) -> dict:
    tasks = {"64": {"exact": 1.0}, "128": {"exact": passkey}, "256": {"exact": 0.0}}
    return {
        # The training domain is measured too, and does not count as short text out of it.
        "text": {"manuals": text(0.0), "news": text(loss), "prose": text(loss)},
        "choices": {"blimp": right, "piqa": "1100"},
        "tasks": {"passkey": tasks, "multi_key": tasks},
    }


def result(kind: str, method: str, rates: tuple = (), seed: int = 0, **fields) -> dict:
    tokens = 1_000_000 if rates else 0
    run = {"kind": kind, "method": method, "rope": "linear", "factor": 4, "tokens": tokens}
    return {**run, "rates": list(rates), "seed": seed, "training_seconds": 12.0, **fields}


RESULTS = [
    result("baseline", "teacher", measured=measured(2.0, "1110")),
    result("baseline", "scaled", measured=measured(4.0, "0000", 0.0)),
    result("final", "logits", (1e-3,), 1, measured=measured(2.5, "1100")),
    result("final", "logits", (1e-3,), 2, measured=measured(3.0, "1110", 1.0)),
]


def search(method: str, rate: float, short: float, far: float, rope: str = "linear") -> dict:
    return result("search", method, (rate,), rope=rope, validation={"news": text(short, far=far)})


def test_the_rate_of_a_stage_has_the_lowest_validation_loss():
    results = [
        search("logits", 1e-3, 2.0, 9.0),
        search("logits", 2e-3, 2.1, 1.0),
        search("logits", 3e-3, math.nan, 1.0),
        search("cpt", 1e-4, 2.0, 9.0),
        search("cpt", 2e-4, 2.1, 1.0),
        search("cpt", 5e-4, 1.0, 0.5, rope="yarn"),
    ]
    # Long windows count for a stage on long text only.
    assert best_rates(results, METHODS["logits+cpt"], "linear") == (1e-3, 2e-4)
    assert best_rates(results, METHODS["cpt"], "yarn") == (5e-4,)
    # A RoPE that was not searched takes the rates of the other.
    assert best_rates(results, METHODS["logits"], "yarn") == (1e-3,)
    with pytest.raises(UserError, match="no learning rate of ours was tried"):
        best_rates(results, METHODS["ours"], "linear")


def test_validation_loss_is_a_mean_over_domains():
    validation = {"a": text(1.0, far=5.0), "b": text(2.0, far=6.0)}
    assert validation_loss({"validation": validation}, False, (16, 64)) == 1.5
    assert validation_loss({"validation": validation}, True, (16, 64)) == 3.5


def test_a_group_compares_with_both_baselines():
    (group,) = groups(RESULTS, "manuals")
    assert group.title == "PI x 4"
    rows = dict(group.rows())
    assert list(rows) == ["teacher", "not restored", "logits KL"]
    first, second = rows["logits KL"]
    assert group.short_loss(first) == 2.5
    # Scaling costs 4 - 2; the runs win back 1.5 and 1.
    assert group.gap(first) == 0.75 and group.gap(second) == 0.5
    assert group.over_seeds([first, second], group.gap) == Number(0.625, 0.125)
    assert group.far_loss(first) == 2.0
    # Beyond M there are two lengths.
    assert group.exact(second, "passkey") == 0.5


def test_kept_questions_have_the_error_of_the_difference_to_the_teacher():
    (group,) = groups(RESULTS, "manuals")
    runs = dict(group.rows())["logits KL"]
    kept = group.kept(runs, lambda task: task == "blimp")
    # The teacher has 3 of 4 right; the students differ from it in the third by half of the seeds.
    assert kept.mean == pytest.approx(100 * (1 - 0.125 / 0.75))
    assert kept.error == pytest.approx(100 * math.sqrt(0.0625 / 4) / 0.75)
    same = group.kept([group.teacher], lambda task: task == "blimp")
    assert same == Number(100.0, 0.0) and same.text(1) == "100.0"


def test_the_table_has_a_row_per_method():
    (group,) = groups(RESULTS, "manuals")
    lines = table(group).splitlines()
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells[:4] == ["logits KL", "1M", "0.001", "2"]
    assert cells[4] == "2.750 ± 0.250" and cells[5] == "62.5 ± 12.5" and cells[-1] == "12"
    assert len(cells) == len(lines[2].split("|")) - 2 == 13


def test_the_report_is_written_as_text_and_as_numbers(tmp_path, capsys):
    results = [*RESULTS, search("logits", 1e-3, 2.0, 9.0)]
    write_report(tmp_path / "new", results, "manuals")
    page = (tmp_path / "new" / "pretrained-tables.md").read_text()
    assert "| logits KL | PI | 0.001: 2.0000 |" in page and page in capsys.readouterr().out
    numbers = json.loads((tmp_path / "new" / "pretrained.json").read_text())
    assert numbers["PI x 4/logits KL/1000000"]["gap"] == 0.625
    with pytest.raises(UserError, match="run the command final first"):
        write_report(tmp_path, results[:2], "manuals")


def test_the_key_of_a_run_names_all_that_it_depends_on():
    run = Run("final", "logits+cpt", "yarn", 8, 4_250_000, (1e-3, 2e-4), 7)
    assert run.key == "final/logits+cpt/yarn/8/4250000/0.001,0.0002/7"
