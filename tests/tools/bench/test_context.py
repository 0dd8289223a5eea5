"""The benchmark of exchanges over the cp axis: on two CPU ranks, and its formulas."""

from __future__ import annotations

import json

import pytest

from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import Axis, build_mesh
from tests.command_line import one_error, tool, user_error
from tests.ranks import run_ranks
from tools.bench import context_traffic
from tools.bench.context_relation import by_all_gather, by_schedule, make_relation

context = tool("bench.context")
SMALL = (
    *("--device", "cpu", "--dtype", "float32", "--repeats", "1"),
    *("--heads", "2", "--head-dim", "16"),
)


def _run(words: list[str]) -> None:
    assert context(*words) == 0


@pytest.mark.parametrize("kind", ["relation", "attention"])
def test_every_length_is_measured_on_one_and_on_two_ranks(kind, tmp_path):
    file = tmp_path / f"{kind}.json"
    words = [*SMALL, "--lengths", "64", "128", "--json", str(file)]
    run_ranks(2, _run, words + (["--attention"] if kind == "attention" else []))
    report = json.loads(file.read_text())
    places = [(result["tokens"], result["ranks"]) for result in report["results"]]
    assert places == [(64, 1), (64, 2), (128, 1), (128, 2)]
    names = {
        "relation": ("by_schedule", "by_schedule_without_transfers", "by_all_gather"),
        "attention": (
            "gather_first",
            "gather_first_without_transfers",
            "local_chunk_first",
            "local_chunk_first_without_transfers",
            "ring",
        ),
    }
    for result in report["results"]:
        assert all(result[f"{name}_seconds"] > 0 for name in names[kind])
    assert report["environment"]["device"] == "cpu" and report["options"]["heads"] == 2


def test_the_columns_of_the_report_are_printed_on_one_rank(capsys):
    assert context(*SMALL, "--lengths", 64) == 0
    heading, row = capsys.readouterr().out.splitlines()[-2:]
    assert heading.split()[:4] == ["tokens", "ranks", "schedule,", "ms"]
    assert row.split()[:2] == ["64", "1"] and row.split()[3] == "1.00"


def _compare_on_four_ranks() -> None:
    import torch

    mesh = build_mesh("cpu", 1, 4)
    torch.manual_seed(mesh.cp.rank)
    relation = make_relation(64, 2, 8, mesh.cp, mesh.device, torch.float32)
    for actual, expected in zip(by_schedule(relation), by_all_gather(relation), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_the_reference_computes_the_relation():
    """On four ranks, where a rank of the schedule fetches fewer chunks than there are."""
    run_ranks(4, _compare_on_four_ranks)


def test_a_length_that_does_not_divide_is_refused_on_every_rank():
    # Rank 0 alone would refuse it for two ranks, and the other would wait.
    sentence = user_error(SequenceShard, 66, Axis(None, 0, 2))
    assert "66 tokens does not divide into 4 pieces" in sentence


def test_the_counted_bytes_are_those_of_the_formula(tmp_path, capsys):
    """On every rank of 2 to 8; then the table for LLaMA2-7B is printed."""
    counted = context_traffic.count()
    assert set(counted) == set(range(2, 9))
    for ranks, pairs in counted.items():
        assert len(pairs) == ranks
        for actual, expected in pairs:
            assert actual == expected and min(vars(actual).values()) > 0


def test_the_table_of_bytes(tmp_path, capsys, monkeypatch):
    file = tmp_path / "traffic.json"
    monkeypatch.setattr(context_traffic, "count", dict)
    assert context("--traffic", "--lengths", 131072, "--json", file) == 0
    results = {result["ranks"]: result for result in json.loads(file.read_text())["results"]}
    assert list(results) == [2, 4, 8, 16, 32, 64]
    gib = 2**30
    # Per rank and layer 1 GiB of one model's K and V on two ranks, and half of it on four.
    assert results[2]["attention_gathering_bytes"] == 4 * 1 * gib
    assert results[4]["attention_gathering_bytes"] == 4 * 3 * gib / 2
    assert results[2]["attention_ring_bytes"] == (4 + 4) * gib
    # Three operands of 0.5 GiB: gathering moves student, teacher and gradients.
    assert results[2]["relations_gathering_bytes"] == 3 * 1.5 * gib
    # The schedule moves as much on two ranks, and five fp32 numbers per row, head and relation.
    reduced = 5 * 3 * 32 * 131072 * 4
    assert results[2]["relations_schedule_bytes"] == 3 * 1.5 * gib + reduced
    assert [results[p]["chunks_fetched"] for p in results] == [1, 2, 3, 4, 6, 8]
    assert "131,072 tokens" in capsys.readouterr().out


def test_a_wrong_counter_fails(monkeypatch):
    from megalard.distill.terms.sharded_relations import Traffic

    wrong = {2: [(Traffic(1, 1, 1), Traffic(1, 1, 1)), (Traffic(1, 1, 1), Traffic(2, 1, 1))]}
    monkeypatch.setattr(context_traffic, "count", lambda: wrong)
    with pytest.raises(AssertionError, match="rank 1 of 2 sent"):
        context_traffic.report(1024)


def test_traffic_starts_its_own_ranks(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert context("--traffic") == 1
    assert "without torchrun" in one_error(capsys.readouterr().err)
