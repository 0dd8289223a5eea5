"""objective: each weight is that of its term in the loss that is trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.settings.tiny_run import LAYERS, TinyRun, projections

NO_RELATIONS = "objective.relations={q: 0, k: 0, v: 0}"


def parts(run: TinyRun) -> dict[str, float]:
    """Return the unweighted terms of the first step."""
    return run.steps[0].result.parts


def assert_weighted(run: TinyRun, **weights: float) -> None:
    """The first loss is the sum of the terms, under their names in reports, with weights."""
    first = run.steps[0].result
    assert set(first.parts) == set(weights)
    assert all(value > 1e-4 for value in first.parts.values())
    total = sum(weight * first.parts[key] for key, weight in weights.items())
    assert first.loss == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def student_logits(run: TinyRun, job) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return teacher's and untrained student's logits of the first step, and its batch.

    Both are made by transformers: the student is the teacher under the exported config.json.
    """
    tokens = torch.cat([batch.tokens_bs for batch in run.steps[0].batches["main"]])
    teacher = AutoModelForCausalLM.from_pretrained(job / "teacher", dtype=torch.float64)
    config = type(teacher.config)(**run.config)
    student = AutoModelForCausalLM.from_pretrained(
        job / "teacher", config=config, dtype=torch.float64
    )
    return teacher(tokens).logits, student(tokens).logits, tokens


def check_relation(run, name: str) -> None:
    weights = {"q": 1.0, "k": 1.0, "v": 1.0} | {name: 3.0}
    text = ", ".join(f"{key}: {weight}" for key, weight in weights.items())
    heavier = run(f"objective.relations={{{text}}}")
    assert parts(heavier) == pytest.approx(parts(run()), rel=1e-6)
    assert_weighted(heavier, **weights)
    # In the last layer the gradient of a projection is that of its relation alone.
    for kind, weight in weights.items():
        key = f"model.layers.1.self_attn.{kind}_proj.lora_B"
        before, after = (r.steps[0].gradients[key] for r in (run(), heavier))
        torch.testing.assert_close(after, weight * before, rtol=1e-4, atol=1e-8)


def test_objective_relations_q(run):
    check_relation(run, "q")


def test_objective_relations_k(run):
    check_relation(run, "k")


def test_objective_relations_v(run):
    check_relation(run, "v")


def test_objective_relations_qk(run):
    only = run("objective.relations={q: 0, k: 0, v: 0, qk: 2}")
    assert_weighted(only, qk=2.0)


def test_objective_layers(run):
    """Only the second layer is compared: nothing is learned in the first but what it feeds on."""
    one = run("objective.layers=[0]", "trainable.mode=weights")
    assert set(one.steps[0].after) == projections("q", "k", "v", layers=(0,))
    means = [parts(run(f"objective.layers=[{layer}]"))["q"] for layer in range(LAYERS)]
    assert parts(run())["q"] == pytest.approx(sum(means) / LAYERS, rel=1e-5)


def test_objective_attention_output(run):
    only = run(NO_RELATIONS, "objective.attention_output=2")
    assert_weighted(only, context=2.0)


def test_objective_hidden_cosine(run):
    only = run(NO_RELATIONS, "objective.hidden_cosine=5")
    assert_weighted(only, hidden=5.0)


def test_objective_hidden_depths(run):
    """The distances of two depths are added."""
    each = [
        parts(run(NO_RELATIONS, "objective.hidden_cosine=5", f"objective.hidden_depths=[{depth}]"))
        for depth in (0.5, 1.0)
    ]
    both = run(NO_RELATIONS, "objective.hidden_cosine=5", "objective.hidden_depths=[0.5, 1]")
    total = sum(one["hidden"] for one in each)
    assert each[0] != each[1]
    assert parts(both)["hidden"] == pytest.approx(total, rel=1e-5)


def test_objective_logits_kl(run, job):
    only = run(NO_RELATIONS, "objective.logits_kl=0.5")
    assert_weighted(only, logits=0.5)
    teacher, student, tokens = student_logits(only, job)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert tokens.shape == (2, 32)
    assert parts(only)["logits"] == pytest.approx(float(expected), rel=1e-3)


def test_objective_logits_temperature(run, job):
    warm = run(NO_RELATIONS, "objective.logits_kl=0.5", "objective.logits_temperature=3")
    teacher, student, _ = student_logits(warm, job)
    log_p, log_q = (teacher / 3).log_softmax(-1), (student / 3).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert parts(warm)["logits"] == pytest.approx(float(expected), rel=1e-3)


def test_objective_logits_positions(run, job):
    last = run(NO_RELATIONS, "objective.logits_kl=0.5", "objective.logits_positions=5")
    teacher, student, _ = student_logits(last, job)
    log_p, log_q = (x[:, -5:].log_softmax(-1) for x in (teacher, student))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert parts(last)["logits"] == pytest.approx(float(expected), rel=1e-3)


def test_objective_language_modelling(run, job):
    only = run(NO_RELATIONS, "objective.language_modelling=2")
    assert_weighted(only, lm=2.0)
    _, student, tokens = student_logits(only, job)
    expected = F.cross_entropy(student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert parts(only)["lm"] == pytest.approx(float(expected), rel=1e-5)
