"""Scores and losses by position against transformers, and the same on every layout."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megalard.evaluation import measure as measure_module
from megalard.evaluation.measure import cut_windows, measure_by_position
from megalard.evaluation.positions import doubling_edges, equal_edges
from megalard.evaluation.retrieval import Score, score
from megalard.evaluation.suite import Suite, run_suite, summarize
from megalard.evaluation.tasks import Sample
from megalard.parallel.mesh import build_mesh
from tests.logits import load
from tests.models import make_model
from tests.ranks import run_ranks

# so small that a token's number on one of two tp ranks is often another token's on the other
VOCAB, LENGTH = 7, 48
EDGES = [1, 3, 20, LENGTH]
# fp32 through three layers against float64: observed at most 3e-7
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    make_model("llama", folder / "model", vocab_size=VOCAB)
    make_model("llama", folder / "teacher", vocab_size=VOCAB, seed=1)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)


@pytest.fixture(scope="module")
def samples(reference) -> list[Sample]:
    """Answers as the model writes them, of one to six tokens; two of three then spoiled."""
    rng, found = np.random.default_rng(0), []
    for number in range(9):
        size = 1 + number % 6
        prompt = rng.integers(0, VOCAB, LENGTH - size)
        answer = generate(reference, prompt, size)
        if number % 3:
            place = rng.integers(size)
            answer[place] = (answer[place] + 1) % VOCAB
        found.append(Sample("passkey", prompt, answer, [0.0, 0.5, 1.0][number % 3]))
    return found


def generate(reference, prompt: np.ndarray, count: int) -> np.ndarray:
    token_bs = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        written = reference.generate(
            token_bs,
            # left to itself it takes every token 0 for padding
            attention_mask=torch.ones_like(token_bs),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
    return written[0, len(prompt) :].numpy()


def windows() -> np.ndarray:
    """Five, which come out uneven over two data-parallel ranks."""
    return np.random.default_rng(1).integers(0, VOCAB, (5, LENGTH))


def test_an_answer_is_right_when_greedy_decoding_writes_it(folder, reference, samples):
    scores = score(load(folder / "model"), samples, build_mesh("cpu", 1), torch.float32)
    for sample, found in zip(samples, scores, strict=True):
        written = generate(reference, sample.prompt, len(sample.answer))
        assert found.exact == np.array_equal(written, sample.answer)
        with torch.no_grad():
            logits = reference(torch.from_numpy(sample.tokens)[None]).logits[0, :-1].double()
        logits, answer = logits[len(sample.prompt) - 1 :], torch.from_numpy(sample.answer)
        right = (logits.argmax(-1) == answer).double().mean()
        loss = torch.nn.functional.cross_entropy(logits, answer)
        assert found.tokens == pytest.approx(float(right))
        assert found.loss == pytest.approx(float(loss), rel=TOLERANCE)
    assert [found.exact for found in scores] == [number % 3 == 0 for number in range(9)]


def test_losses_by_position_are_transformers(folder, reference):
    mesh = build_mesh("cpu", 1)
    whole, apart = measure_by_position(
        load(folder / "model"), windows(), EDGES, mesh, torch.float32, load(folder / "teacher")
    )
    tokens = torch.from_numpy(windows())
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64)
    with torch.no_grad():
        log_p, log_t = (m(tokens).logits[:, :-1].log_softmax(-1) for m in (reference, teacher))
    loss = -log_p.gather(2, tokens[:, 1:, None])[..., 0]
    kl = (log_t.exp() * (log_t - log_p)).sum(-1)
    same = (log_t.argmax(-1) == log_p.argmax(-1)).double()
    assert whole.loss == pytest.approx(float(loss.mean()), rel=TOLERANCE)
    assert len(apart) == 3
    for start, end, found in zip(EDGES[:-1], EDGES[1:], apart, strict=True):
        # the token at position p is predicted at place p - 1
        span = slice(start - 1, end - 1)
        assert found.loss == pytest.approx(float(loss[:, span].mean()), rel=TOLERANCE)
        assert found.kl == pytest.approx(float(kl[:, span].mean()), rel=TOLERANCE)
        assert found.agreement == pytest.approx(float(same[:, span].mean()), abs=1e-12)


def everything(folder: str, samples, mesh) -> dict:
    model, teacher = (load(f"{folder}/{name}", mesh.tp) for name in ("model", "teacher"))
    suite = Suite(
        cut_windows(windows().ravel(), [16, LENGTH], 10**6), {"passkey": {LENGTH: samples}}
    )
    read = []
    results = run_suite(
        model, suite, mesh, torch.float32, teacher, 16, edges=EDGES, advance=read.append
    )
    scores = [asdict(found) for found in score(model, samples, mesh, torch.float32)]
    return {"results": asdict(results), "scores": scores, "read": sum(read)}


LAYOUTS = {"dp 2": (1, 1), "tp 2": (2, 1), "cp 2": (1, 2)}


def _on_ranks(folder: str, samples, path: str) -> None:
    found = {
        name: everything(folder, samples, build_mesh("cpu", *LAYOUTS[name])) for name in LAYOUTS
    }
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, found)
    # every rank has every figure
    assert gathered[0]["cp 2"]["results"] == gathered[1]["cp 2"]["results"]
    if torch.distributed.get_rank() == 0:
        torch.save(found, path)


def test_every_layout_measures_the_same(folder, samples, tmp_path, monkeypatch):
    expected = everything(str(folder), samples, build_mesh("cpu", 1))
    run_ranks(2, _on_ranks, str(folder), samples, str(tmp_path / "found.pt"))
    found = torch.load(tmp_path / "found.pt")
    for name in LAYOUTS:
        assert_same(found[name]["results"], expected["results"], name)
        assert_same(found[name]["scores"], expected["scores"], name)
    # nor do passes and chunks matter
    monkeypatch.setattr(measure_module, "_ROWS", 8)
    monkeypatch.setattr(measure_module, "_TOKENS_PER_PASS", 2 * LENGTH)
    assert_same(everything(str(folder), samples, build_mesh("cpu", 1)), expected, "passes")
    # the bar ends at what was promised
    suite = Suite(
        cut_windows(windows().ravel(), [16, LENGTH], 10**6), {"passkey": {LENGTH: samples}}
    )
    assert expected["read"] == suite.tokens(16) == 3 * 240 + 9 * LENGTH
    assert found["tp 2"]["read"] == expected["read"]


def assert_same(found, expected, where: str) -> None:
    """Equal, and figures to fp32 rounding: another layout sums in another order."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}, {place}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=TOLERANCE), where
    else:
        assert found == expected, where


def test_a_summary_is_by_depth(samples):
    scores = [Score(number % 3 == 0, number / 10, float(number)) for number in range(9)]
    found = summarize(samples, scores)
    assert found.exact == pytest.approx(1 / 3) and found.loss == pytest.approx(4)
    assert found.tokens == pytest.approx(0.4) and found.samples == 9
    assert found.by_depth == {0.0: 1.0, 0.5: 0.0, 1.0: 0.0}


def test_intervals_cover_a_window():
    assert doubling_edges(100) == [1, 16, 32, 64, 100]
    assert doubling_edges(128) == [1, 16, 32, 64, 128]
    assert doubling_edges(8) == [1, 8]
    assert equal_edges(1024, 4) == [1, 256, 512, 768, 1024]
