"""Loss, KL and agreement against transformers in float64 (over ranks: ``test_retrieval.py``)."""

from __future__ import annotations

import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megalard.config.schema import RopeConfig
from megalard.errors import UserError
from megalard.evaluation import measure as measure_module
from megalard.evaluation.measure import Measurement, choose_windows, default_lengths, measure
from megalard.model.rope import scaled_config
from megalard.model.spec import read_spec
from megalard.parallel.mesh import build_mesh
from tests.logits import load
from tests.models import copy_with_config, make_model

# fp32 logits against float64; observed at most 5e-7
TOLERANCE = 1e-5
WINDOWS, LENGTH, VOCAB = 5, 22, 7


def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (WINDOWS, LENGTH))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher and a student with scaled RoPE."""
    folder = tmp_path_factory.mktemp("measure")
    teacher = make_model("llama-tied", folder / "teacher", vocab_size=VOCAB)
    config = scaled_config(read_spec(teacher), RopeConfig("linear", 4.0), 64)
    copy_with_config(teacher, folder / "student", config)
    return folder


@pytest.fixture(scope="module")
def expected(models):
    """The student's (loss, KL, agreement) as transformers gives them in float64."""

    def log_probabilities(name):
        model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64)
        with torch.no_grad():
            return model(torch.from_numpy(windows())).logits[:, :-1].log_softmax(-1)

    student, teacher = log_probabilities("student"), log_probabilities("teacher")
    target = torch.from_numpy(windows())[:, 1:, None]
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    same = (student.argmax(-1) == teacher.argmax(-1)).double().mean()
    assert 0.02 < same < 0.98 and kl > 0.1, "the models are too alike to tell an error"
    right = (student.argmax(-1) == target[..., 0]).double().mean()
    return float(-student.gather(2, target).mean()), float(kl), float(same), float(right)


def measured(folder, mesh) -> Measurement:
    teacher, student = (load(f"{folder}/{name}", mesh.tp) for name in ("teacher", "student"))
    return measure(student, windows(), mesh, torch.float32, teacher)


def assert_measured(found: dict, expected: tuple) -> None:
    assert [found[key] for key in ("loss", "kl")] == pytest.approx(expected[:2], rel=TOLERANCE)
    shares = [found[key] for key in ("agreement", "accuracy")]
    assert shares == pytest.approx(expected[2:], abs=1e-12)


def test_loss_kl_and_agreement_are_transformers(models, expected):
    found = measured(models, build_mesh("cpu", 1))
    assert_measured(asdict(found), expected)
    assert found.perplexity == pytest.approx(math.exp(expected[0]), rel=TOLERANCE)


def test_passes_and_chunks_do_not_matter(models, expected, monkeypatch):
    monkeypatch.setattr(measure_module, "_ROWS", 8)
    monkeypatch.setattr(measure_module, "_TOKENS_PER_PASS", 2 * LENGTH)
    assert_measured(asdict(measured(models, build_mesh("cpu", 1))), expected)


def test_a_model_agrees_with_itself(models):
    mesh = build_mesh("cpu", 1)
    teacher = load(models / "teacher")
    found = measure(teacher, windows(), mesh, torch.float32, teacher)
    assert found.kl == 0 and found.agreement == 1
    alone = measure(teacher, windows(), mesh, torch.float32)
    assert alone == Measurement(found.loss, accuracy=found.accuracy)


def test_a_hopeless_loss_still_has_a_perplexity():
    assert math.isfinite(Measurement(1e6).perplexity)


def test_default_lengths_double_up_to_the_new_window():
    assert default_lengths(256, 8) == [64, 128, 256, 512, 1024, 2048]
    assert default_lengths(256, 6) == [64, 128, 256, 512, 1024, 1536]
    assert default_lengths(4, 2) == [2, 4, 8]


def store_of(count: int):
    """Stands for a token store that holds 0, 1, 2, ..."""
    tokens = np.arange(count)
    return SimpleNamespace(tokens=tokens, read=lambda start, end: tokens[start:end])


def test_every_length_reads_the_same_tokens():
    found = choose_windows(store_of(1000), [8, 16, 64], max_tokens=200, tp=2)
    assert {length: x.shape for length, x in found.items()} == {
        8: (24, 8),
        16: (12, 16),
        64: (3, 64),
    }
    for x in found.values():
        np.testing.assert_array_equal(x.reshape(-1), np.arange(192))


def test_the_longest_window_is_read_even_beyond_max_tokens():
    assert choose_windows(store_of(100), [8, 64], max_tokens=10, tp=1)[64].shape == (1, 64)


@pytest.mark.parametrize(
    ("lengths", "tp", "sentence"),
    [
        ([8, 128], 1, "held-out text has 100 tokens but evaluation.lengths asks for 128"),
        ([8, 9], 2, "evaluation length 9 is not a multiple of parallel.tp 2"),
    ],
)
def test_lengths_that_cannot_be_measured_are_refused(lengths, tp, sentence):
    with pytest.raises(UserError, match=sentence):
        choose_windows(store_of(100), lengths, max_tokens=1000, tp=tp)
