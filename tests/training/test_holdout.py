"""Text that is taken aside for evaluation: how much, from where, and the same after a resume."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megalard.training import holdout
from megalard.training.holdout import split_holdout
from megalard.training.streams import open_streams
from tests.jobs import NATIVE, arguments, interrupted, metrics, train


@pytest.fixture
def split(planned, tmp_path):
    """A function that splits the text of a run: the stores before and after, and the part."""

    def split(*options: str):
        run = planned("evaluation.holdout=32768", *options)
        stores = open_streams(run.stages, tmp_path / "tokens", run.plan, run.mesh)
        return stores, *split_holdout(stores, run.stages, run.plan, run.output)

    return split


def test_the_end_of_the_text_is_taken_aside(split):
    """At most a fiftieth of the text."""
    before, after, held_out = split()
    tokens = before["main"]["main"].tokens
    count = len(tokens) // 50
    assert NATIVE < count < 32768
    assert np.array_equal(held_out.tokens, tokens[-count:])
    assert np.array_equal(after["main"]["main"].tokens, tokens[:-count])
    assert held_out.boundaries == before["main"]["main"].boundaries


def test_at_most_the_configured_number_is_taken(split):
    _, _, held_out = split("evaluation.holdout=70")
    assert len(held_out.tokens) == 70


@pytest.mark.parametrize(
    "options",
    [
        ("evaluation.holdout=0",),
        # Less than one native window says too little.
        ("evaluation.holdout=63",),
        # The last block would be missing: 220 blocks are in the text, and 216 without its end.
        ("optimizer.global_batch=220",),
    ],
)
def test_nothing_is_taken_where_it_is_too_little_or_missed(options, split):
    before, after, held_out = split(*options)
    assert held_out is None and after is before


def test_nothing_is_taken_where_other_text_is_given(split, small_job):
    _, _, held_out = split(f"evaluation.paths={small_job / 'heldout.txt'}")
    assert held_out is None


def test_only_streams_of_that_text_lose_it(split, small_job):
    terms = "objective: {logits_kl: 1}"
    other = f"data: {{paths: [{small_job / 'heldout.txt'}]}}"
    before, after, _ = split(f"streams={{a: {{{terms}}}, b: {{{terms}, {other}}}, c: {{{terms}}}}}")
    assert len(after["main"]["a"].tokens) < len(before["main"]["a"].tokens)
    assert after["main"]["c"] is after["main"]["a"]
    assert after["main"]["b"] is before["main"]["b"]


def test_a_resumed_run_of_several_stages_keeps_its_split(planned, tmp_path, monkeypatch):
    """The checkpoint records how many tokens of text each stage trains on."""
    run = planned("stages={a: {}, b: {}}", "evaluation.holdout=32768")
    stores = open_streams(run.stages, tmp_path / "tokens", run.plan, run.mesh)
    tokens = len(stores["a"]["main"].tokens)
    data = {"a/main": {"tokens": tokens - 100}, "b/main": {"tokens": tokens - 100}}
    monkeypatch.setattr(
        holdout, "read_manifest", lambda path: SimpleNamespace(training={"data": data})
    )
    output = replace(run.output, checkpoint=tmp_path)
    after, held_out = split_holdout(stores, run.stages, run.plan, output)
    assert len(held_out.tokens) == 100
    assert len(after["a"]["main"].tokens) == len(after["b"]["main"].tokens) == tokens - 100


def test_a_resumed_run_keeps_its_split(small_job, tmp_path):
    """Whatever the configuration says now; otherwise it would go on with other blocks."""
    save = ("checkpoint.save_every=2", "checkpoint.keep_last=9")
    train(arguments(small_job, tmp_path / "run", "evaluation.holdout=100", *save))
    output = interrupted(tmp_path / "run", tmp_path / "output")
    held_out = f"evaluation.paths={small_job / 'heldout.txt'}"
    train(arguments(small_job, output, "evaluation.holdout=0", held_out, *save))
    losses = [[line["loss"] for line in metrics(path)] for path in (tmp_path / "run", output)]
    assert losses[0] == losses[1]
