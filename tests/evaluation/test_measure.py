"""Loss, KL and agreement against transformers in float64; windows, lengths and intervals."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megalard.config.schema import RopeConfig
from megalard.evaluation import measure as measure_module
from megalard.evaluation.measure import (
    Measurement,
    check_lengths,
    cut_windows,
    default_lengths,
    doubling_edges,
    equal_edges,
    length_multiple,
    measure,
    measure_and_record,
    measure_by_position,
    passes,
)
from megalard.model.rope import scaled_config
from megalard.model.spec import read_spec
from megalard.parallel.mesh import SINGLE, Axis, Mesh, build_mesh
from tests.command_line import user_error
from tests.logits import load
from tests.models import copy_with_config, make_model

# fp32 logits against float64; observed at most 5e-7.
TOLERANCE = 1e-5
WINDOWS, LENGTH, VOCAB = 5, 22, 7


def windows() -> np.ndarray:
    """Return random windows, int64 [windows, length]."""
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
    """The student's (loss, KL, agreement, accuracy) by transformers in float64."""

    def log_probabilities(name):
        model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64)
        with torch.no_grad():
            return model(torch.from_numpy(windows())).logits[:, :-1].log_softmax(-1)

    student, teacher = log_probabilities("student"), log_probabilities("teacher")
    target = torch.from_numpy(windows())[:, 1:, None]
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    same = (student.argmax(-1) == teacher.argmax(-1)).double().mean()
    assert 0.02 < same < 0.98 and kl > 0.1, "the models are too alike to show an error"
    correct = (student.argmax(-1) == target[..., 0]).double().mean()
    return float(-student.gather(2, target).mean()), float(kl), float(same), float(correct)


def measured(folder, mesh) -> Measurement:
    """Measure the student next to the teacher."""
    teacher, student = (load(f"{folder}/{name}", mesh.tp) for name in ("teacher", "student"))
    return measure(student, windows(), mesh, torch.float32, teacher)


def assert_measured(actual: dict, expected: tuple) -> None:
    assert [actual[key] for key in ("loss", "kl")] == pytest.approx(expected[:2], rel=TOLERANCE)
    shares = [actual[key] for key in ("agreement", "accuracy")]
    assert shares == pytest.approx(expected[2:], abs=1e-12)


def test_loss_kl_and_agreement_are_those_of_transformers(models, expected):
    actual = measured(models, build_mesh("cpu", 1))
    assert_measured(asdict(actual), expected)
    assert actual.perplexity == pytest.approx(math.exp(expected[0]), rel=TOLERANCE)


def test_passes_and_chunks_do_not_matter(models, expected, monkeypatch):
    monkeypatch.setattr(measure_module, "_LOGIT_ROWS", 8)
    monkeypatch.setattr(measure_module, "_TOKENS_PER_PASS", 2 * LENGTH)
    assert_measured(asdict(measured(models, build_mesh("cpu", 1))), expected)


def test_a_model_agrees_with_itself(models):
    mesh = build_mesh("cpu", 1)
    teacher = load(models / "teacher")
    compared = measure(teacher, windows(), mesh, torch.float32, teacher)
    assert compared.kl == 0 and compared.agreement == 1
    alone = measure(teacher, windows(), mesh, torch.float32)
    assert alone == Measurement(compared.loss, accuracy=compared.accuracy)


def test_a_hopeless_loss_still_has_a_perplexity():
    assert math.isfinite(Measurement(1e6).perplexity)


def test_default_lengths_double_up_to_the_new_window():
    assert default_lengths(256, 8) == [64, 128, 256, 512, 1024, 2048]
    assert default_lengths(256, 6) == [64, 128, 256, 512, 1024, 1536]
    assert default_lengths(4, 2) == [2, 4, 8]
    assert default_lengths(256, 2.5) == [64, 128, 256, 512, 640]


EDGES = [1, 3, 20, LENGTH]


def test_losses_by_position_are_those_of_transformers(models):
    mesh = build_mesh("cpu", 1)
    student, teacher = load(models / "student"), load(models / "teacher")
    overall, intervals = measure_by_position(
        student, windows(), EDGES, mesh, torch.float32, teacher
    )
    tokens = torch.from_numpy(windows())
    log_p, log_t = (
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float64)(tokens)
        .logits[:, :-1]
        .detach()
        .log_softmax(-1)
        for name in ("student", "teacher")
    )
    loss = -log_p.gather(2, tokens[:, 1:, None])[..., 0]
    kl = (log_t.exp() * (log_t - log_p)).sum(-1)
    same = (log_t.argmax(-1) == log_p.argmax(-1)).double()
    assert overall.loss == pytest.approx(float(loss.mean()), rel=TOLERANCE)
    assert len(intervals) == 3
    for start, end, actual in zip(EDGES[:-1], EDGES[1:], intervals, strict=True):
        # The token at position p is predicted at place p - 1.
        span = slice(start - 1, end - 1)
        assert actual.loss == pytest.approx(float(loss[:, span].mean()), rel=TOLERANCE)
        # At the first positions the models differ little, and so the KL is a small difference.
        assert actual.kl == pytest.approx(float(kl[:, span].mean()), rel=TOLERANCE, abs=1e-7)
        assert actual.agreement == pytest.approx(float(same[:, span].mean()), abs=1e-12)


def test_intervals_cover_a_window():
    assert doubling_edges(100) == [1, 16, 32, 64, 100]
    assert doubling_edges(128) == [1, 16, 32, 64, 128]
    assert doubling_edges(8) == [1, 8]
    assert equal_edges(1024, 4) == [1, 256, 512, 768, 1024]


def test_every_length_reads_the_same_tokens():
    cut = cut_windows(np.arange(1000), [8, 16, 64], max_tokens=200)
    assert {length: x.shape for length, x in cut.items()} == {8: (24, 8), 16: (12, 16), 64: (3, 64)}
    for x in cut.values():
        np.testing.assert_array_equal(x.reshape(-1), np.arange(192))


def test_the_longest_window_is_read_even_beyond_max_tokens():
    assert cut_windows(np.arange(100), [8, 64], max_tokens=10)[64].shape == (1, 64)


def test_windows_may_begin_with_given_tokens():
    """Every window begins with 77, and with 88 after it, and the text goes on without a gap."""
    cut = cut_windows(np.arange(60), [10, 30], max_tokens=60, start=[77, 88])
    assert {length: x.shape for length, x in cut.items()} == {10: (7, 10), 30: (2, 30)}
    for x in cut.values():
        assert (x[:, :2] == [77, 88]).all()
        text = x[:, 2:].reshape(-1)
        np.testing.assert_array_equal(text, np.arange(len(text)))


def test_the_beginning_of_a_document_is_not_put_twice():
    """The text has the BOS token 1 where a document begins, here at the start of a window."""
    text = np.array([1, 5, 6, 7, 1, 8, 9, 10, 11])
    (cut,) = cut_windows(text, [4], max_tokens=8, start=[1]).values()
    assert cut.tolist() == [[1, 5, 6, 7], [1, 8, 9, 10]]


@pytest.mark.parametrize(
    ("length", "start", "sentence"),
    [
        (128, (), "the held-out text has 100 tokens but the longest length is 128: give more text"),
        (2, (7, 7), "a window of 2 tokens has no room for text after the 2 tokens that the"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(length, start, sentence):
    assert sentence in user_error(cut_windows, np.arange(100), [length], 1000, start)


@pytest.mark.parametrize(("cp", "multiple", "instead"), [(2, 4, 8), (3, 6, 6), (8, 16, 16)])
def test_lengths_that_the_cp_ranks_cannot_share_are_refused(cp, multiple, instead):
    assert length_multiple(cp) == multiple and length_multiple(1) == 1
    check_lengths([multiple, 4 * multiple], cp, "--lengths")
    assert user_error(check_lengths, [4 * multiple, 9], cp, "--lengths") == (
        f"length 9 in --lengths is not a multiple of {multiple}, into which cp {cp} cuts it: use "
        f"{instead}"
    )


@pytest.mark.parametrize("tokens_per_pass", [LENGTH, 2 * LENGTH, 16384])
def test_a_recorded_teacher_takes_the_place_of_the_teacher(tokens_per_pass, models, monkeypatch):
    """Five windows are five, three and one passes."""
    monkeypatch.setattr(measure_module, "_TOKENS_PER_PASS", tokens_per_pass)
    mesh = build_mesh("cpu", 1)
    teacher, student = load(models / "teacher"), load(models / "student")
    head = teacher.head_weight.detach()
    measured, recorded = measure_and_record(teacher, windows(), mesh, torch.float32, head)
    assert measured == measure(teacher, windows(), mesh, torch.float32)
    assert len(recorded.hidden) == {LENGTH: 5, 2 * LENGTH: 3, 16384: 1}[tokens_per_pass]
    expected = measure(student, windows(), mesh, torch.float32, teacher)
    assert expected.kl > 0.01
    assert measure(student, windows(), mesh, torch.float32, recorded) == expected


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_all_ranks_make_equally_many_passes(count):
    """Ranks gather weights from each other in every pass; one that had none would be waited for."""
    rows = []
    for rank in range(3):
        dp = Axis(None, rank, 3)
        mesh = Mesh(dp, dp, SINGLE, dp, SINGLE, torch.device("cpu"))
        rows.append(list(passes(count, 4096, mesh)))
    assert len({len(passes_of_rank) for passes_of_rank in rows}) == 1
    assert sorted(row for rank in rows for part in rank for row in part) == [*range(count)]
