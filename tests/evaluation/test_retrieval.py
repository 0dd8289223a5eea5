"""Scores of answers against greedy decoding and losses by transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megalard.evaluation.retrieval import score
from megalard.evaluation.samples import Sample
from megalard.parallel.mesh import build_mesh
from tests.logits import load
from tests.models import make_model

VOCAB, LENGTH = 7, 48
# fp32 through three layers against float64: observed at most 3e-7.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model."""
    folder = tmp_path_factory.mktemp("retrieval")
    make_model("llama", folder / "model", vocab_size=VOCAB)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    """The model by transformers, in float64."""
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)


@pytest.fixture(scope="module")
def samples(reference) -> list[Sample]:
    """Answers of one to six tokens that the model writes, two of three of which are spoiled."""
    rng, samples = np.random.default_rng(0), []
    for number in range(9):
        size = 1 + number % 6
        prompt = rng.integers(0, VOCAB, LENGTH - size)
        answer = generate(reference, prompt, size)
        if number % 3:
            place = rng.integers(size)
            answer[place] = (answer[place] + 1) % VOCAB
        samples.append(Sample("passkey", prompt, answer, [0.0, 0.5, 1.0][number % 3]))
    return samples


def generate(reference, prompt: np.ndarray, count: int) -> np.ndarray:
    """Return the tokens that greedy decoding writes."""
    token_bs = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        written = reference.generate(
            token_bs,
            # Without a mask transformers takes every token 0 for padding.
            attention_mask=torch.ones_like(token_bs),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
    return written[0, len(prompt) :].numpy()


def test_an_answer_is_exact_if_greedy_decoding_writes_it(folder, reference, samples):
    scores = score(load(folder / "model"), samples, build_mesh("cpu", 1), torch.float32)
    for sample, actual in zip(samples, scores, strict=True):
        written = generate(reference, sample.prompt, len(sample.answer))
        assert actual.exact == np.array_equal(written, sample.answer)
        with torch.no_grad():
            logits = reference(torch.from_numpy(sample.tokens)[None]).logits[0, :-1].double()
        logits, answer = logits[len(sample.prompt) - 1 :], torch.from_numpy(sample.answer)
        correct = (logits.argmax(-1) == answer).double().mean()
        loss = torch.nn.functional.cross_entropy(logits, answer)
        assert actual.tokens == pytest.approx(float(correct))
        assert actual.loss == pytest.approx(float(loss), rel=TOLERANCE)
    assert [actual.exact for actual in scores] == [number % 3 == 0 for number in range(9)]
