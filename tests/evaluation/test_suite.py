"""The suite: every layout measures the same, and text and samples are the same for all models."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from megalard.data.boundaries import Boundaries
from megalard.data.token_store_writer import build_store
from megalard.errors import UserError
from megalard.evaluation import measure as measure_module
from megalard.evaluation.measure import cut_windows
from megalard.evaluation.retrieval import Score, score
from megalard.evaluation.samples import Sample, sentence_filler
from megalard.evaluation.suite import Suite, make_samples, read_text, run_suite, summarize
from megalard.parallel.mesh import build_mesh
from tests.logits import load
from tests.models import make_model
from tests.ranks import run_ranks
from tests.small_tokenizers import EOS, make_byte_tokenizer

# So small that an id on one of two tp ranks is often another id on the other rank.
VOCAB, LENGTH = 7, 48
EDGES = [1, 3, 20, LENGTH]
# fp32 through three layers; the order of summation differs between layouts.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and a teacher."""
    folder = tmp_path_factory.mktemp("suite")
    make_model("llama", folder / "model", vocab_size=VOCAB)
    make_model("llama", folder / "teacher", vocab_size=VOCAB, seed=1)
    return folder


def make_suite(short: int = 16, long: int = LENGTH) -> Suite:
    """Return windows, whose number two data-parallel ranks do not divide, and samples."""
    rng = np.random.default_rng(1)
    windows = cut_windows(rng.integers(0, VOCAB, 5 * long), [short, long], 10**6)
    samples = []
    for number in range(9):
        size = 1 + number % 6
        tokens = rng.integers(0, VOCAB, long)
        depth = [0.0, 0.5, 1.0][number % 3]
        samples.append(Sample("passkey", tokens[:-size], tokens[-size:], depth))
    return Suite(windows, {"passkey": {long: samples}})


def measure_all(folder: str, mesh, short: int = 16, long: int = LENGTH) -> dict:
    """Return everything that is measured, and the number of tokens that were read."""
    model, teacher = (load(f"{folder}/{name}", mesh.tp) for name in ("model", "teacher"))
    suite, read = make_suite(short, long), []
    edges = [*EDGES[:-1], long]
    results = run_suite(
        model, suite, mesh, torch.float32, teacher, short, edges=edges, advance=read.append
    )
    samples = suite.samples["passkey"][long]
    scores = [asdict(one) for one in score(model, samples, mesh, torch.float32)]
    return {"results": asdict(results), "scores": scores, "read": sum(read)}


# Passes of 225 and 405 tokens, which two tp ranks do not divide.
ODD = (15, 45)
LAYOUTS = {"dp 2": (1, 1), "tp 2": (2, 1), "cp 2": (1, 2)}


def _on_ranks(folder: str, path: str) -> None:
    measured = {name: measure_all(folder, build_mesh("cpu", *LAYOUTS[name])) for name in LAYOUTS}
    measured["odd"] = measure_all(folder, build_mesh("cpu", 2), *ODD)
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, measured)
    # Every rank has every figure.
    assert gathered[0]["cp 2"]["results"] == gathered[1]["cp 2"]["results"]
    if torch.distributed.get_rank() == 0:
        torch.save(measured, path)


def test_every_layout_measures_the_same(folder, tmp_path, monkeypatch):
    expected = measure_all(str(folder), build_mesh("cpu", 1))
    run_ranks(2, _on_ranks, str(folder), str(tmp_path / "measured.pt"))
    measured = torch.load(tmp_path / "measured.pt")
    for name in LAYOUTS:
        assert_same(measured[name]["results"], expected["results"], name)
        assert_same(measured[name]["scores"], expected["scores"], name)
    odd = measure_all(str(folder), build_mesh("cpu", 1), *ODD)
    assert_same(measured["odd"]["results"], odd["results"], "odd lengths on two tp ranks")
    assert_same(measured["odd"]["scores"], odd["scores"], "odd lengths on two tp ranks")
    # The sizes of passes and of parts of the logits do not matter either.
    monkeypatch.setattr(measure_module, "_LOGIT_ROWS", 8)
    monkeypatch.setattr(measure_module, "_TOKENS_PER_PASS", 2 * LENGTH)
    assert_same(measure_all(str(folder), build_mesh("cpu", 1)), expected, "passes")
    # The progress bar ends at its total: two models read windows of 16, one reads the others.
    assert expected["read"] == make_suite().tokens(16) == 3 * 240 + 9 * LENGTH
    assert measured["tp 2"]["read"] == expected["read"]


def assert_same(actual, expected, where: str) -> None:
    """Compare results; numbers may differ by fp32 rounding."""
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for place, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, f"{where}, {place}")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=TOLERANCE), where
    else:
        assert actual == expected, where


def test_only_short_windows_are_compared_and_only_the_longest_have_positions(folder):
    results = measure_all(str(folder), build_mesh("cpu", 1))["results"]
    assert results["by_length"][16]["kl"] > 0 and results["by_length"][LENGTH]["kl"] is None
    assert results["edges"] == EDGES and len(results["by_position"]) == 3


def test_a_summary_is_by_depth():
    samples = make_suite().samples["passkey"][LENGTH]
    scores = [Score(number % 3 == 0, number / 10, float(number)) for number in range(9)]
    summary = summarize(samples, scores)
    assert summary.exact == pytest.approx(1 / 3) and summary.loss == pytest.approx(4)
    assert summary.tokens == pytest.approx(0.4) and summary.samples == 9
    assert summary.by_depth == {0.0: 1.0, 0.5: 0.0, 1.0: 0.0}


def test_text_is_read_with_the_tokens_around_documents(tmp_path):
    tokenizer, path = make_byte_tokenizer(), tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in ("ab", "cde", "f")))
    boundaries = Boundaries((7,), (EOS,))
    read = read_text([path], tokenizer, boundaries, 100, "content")
    assert read.dtype == np.int64
    assert read.tolist() == [7, 97, 98, EOS, 7, 99, 100, 101, EOS, 7, 102, EOS]
    assert read_text([path], tokenizer, boundaries, 6, "content").tolist() == read[:6].tolist()


def test_a_token_store_is_read_in_place_of_text(tmp_path):
    tokenizer, path = make_byte_tokenizer(), tmp_path / "x.txt"
    path.write_text("some text")
    build_store([path], tokenizer, tmp_path / "store")
    read = read_text([tmp_path / "store"], tokenizer, Boundaries(), 4)
    assert bytes(read.tolist()) == b"some"
    with pytest.raises(UserError, match="was made with the tokenizer of fingerprint"):
        read_text([tmp_path / "store"], make_byte_tokenizer(name="other"), Boundaries(), 4)


def test_samples_are_made_for_every_task_length_and_depth():
    tokenizer = make_byte_tokenizer()
    filler = sentence_filler(tokenizer)
    tasks, depths = ["passkey", "multi_value"], [0.0, 1.0]
    samples, skipped = make_samples(tasks, tokenizer, [30, 600], filler, depths, count=3)
    assert {task: [*by_length] for task, by_length in samples.items()} == {
        "passkey": [600],
        "multi_value": [600],
    }
    assert skipped == (("passkey", 30), ("multi_value", 30))
    assert [sample.depth for sample in samples["passkey"][600]] == [0.0] * 3 + [1.0] * 3
    # A task without depth has as many samples, all of them different.
    without = samples["multi_value"][600]
    assert [sample.depth for sample in without] == [None] * 6
    assert len({tuple(sample.tokens.tolist()) for sample in without}) == 6
    other_seed, _ = make_samples(tasks, tokenizer, [600], filler, depths, count=3, seed=1)
    of_two_seeds = [*samples["multi_value"][600], *other_seed["multi_value"][600]]
    assert len({tuple(sample.tokens.tolist()) for sample in of_two_seeds}) == 12


def test_the_largest_id_is_of_windows_and_samples():
    sample = Sample("passkey", np.array([3, 9]), np.array([12]), 0.0)
    assert Suite({2: np.array([[4, 11]])}, {"passkey": {3: [sample]}}).largest_id() == 12
    assert Suite({2: np.array([[4, 11]])}).largest_id() == 11
