"""One step: sums over micro-batches, the loss of the step, and what is not finite."""

from __future__ import annotations

import pytest
import torch

from megalard.errors import UserError
from megalard.training.models import load_models
from megalard.training.step import Distiller
from megalard.training.streams import make_loaders, open_streams


@pytest.fixture
def make(planned, tmp_path):
    """A function that makes a distiller and the micro-batches of its first step."""

    def make(*options: str):
        run = planned(*options)
        stage = run.stages[0]
        teacher, student = load_models(stage, run.plan, run.mesh)
        for name, parameter in student.trained.items():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.1)
        distiller = Distiller(teacher, student, stage.config, run.mesh)
        stores = open_streams(run.stages, tmp_path / "tokens", run.plan, run.mesh)
        with make_loaders(stage, stores, run.plan, run.mesh) as loaders:
            return distiller, loaders.step(0, run.mesh.device)

    return make


def gradients(distiller, batches, number: int = 0) -> torch.Tensor:
    """Return the gradient of a step as one vector."""
    torch.manual_seed(0)
    distiller.accumulate(batches, number)
    return flat_gradient(distiller)


def flat_gradient(distiller) -> torch.Tensor:
    return torch.cat([part.flatten() for _, part in distiller.masters.local_gradients()])


def test_the_gradient_does_not_depend_on_the_size_of_micro_batches(make):
    torch.manual_seed(1)
    expected = gradients(*make("optimizer.micro_batch=4"))
    for size in (1, 2):
        torch.manual_seed(1)
        actual = gradients(*make(f"optimizer.micro_batch={size}"))
        # Only the order of the sums differs.
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_gradients_of_a_step_do_not_add_up_over_steps(make):
    distiller, batches = make()
    expected = gradients(distiller, batches)
    assert torch.equal(gradients(distiller, batches), expected)


def test_dropout_differs_from_step_to_step(make):
    distiller, batches = make()
    assert not torch.equal(gradients(distiller, batches, 0), gradients(distiller, batches, 1))
    without, batches = make("trainable.lora={rank: 4, alpha: 8, dropout: 0}")
    assert torch.equal(gradients(without, batches, 0), gradients(without, batches, 1))


def test_dropout_differs_from_stream_to_stream(make):
    """The two streams read the same text."""
    streams = "{a: {objective: {relations: {q: 1}}}, b: {objective: {relations: {q: 1}}}}"
    distiller, batches = make(f"streams={streams}", "optimizer.micro_batch=4")
    seeds = []

    class Key:
        def __setattr__(self, name, value):
            seeds.append(value)

    distiller.student.dropout = Key()
    for step in (0, 1):
        distiller.accumulate(batches, step)
    assert len(seeds) == len(set(seeds)) == 4


def test_offloaded_tensors_give_the_same_gradient(make):
    torch.manual_seed(1)
    expected = gradients(*make("parallel.offload=false"))
    torch.manual_seed(1)
    assert torch.equal(gradients(*make("parallel.offload=true")), expected)


def test_the_loss_is_the_weighted_sum_of_the_reported_parts(make):
    distiller, batches = make(
        "streams={a: {objective: {relations: {q: 2, v: 3}}, weight: 0.5}, "
        "b: {objective: {logits_kl: 5}, weight: 7}}"
    )
    result = distiller.step(batches, 0)
    assert [*result.parts] == ["a.q", "a.v", "b.logits"]
    q, v, logits = result.parts.values()
    assert result.loss == pytest.approx(0.5 * (2 * q + 3 * v) + 7 * 5 * logits)
    assert result.skipped is None


def test_the_parts_of_a_single_stream_have_short_names(make):
    distiller, batches = make("objective.logits_kl=1")
    assert [*distiller.step(batches, 0).parts] == ["q", "k", "v", "logits"]


def test_the_layers_of_a_relation_have_its_mean_and_norms_add_up_over_kinds(make):
    options = (
        "objective.hidden_cosine=1",
        "trainable.lora={rank: 4, targets: [q, k, v, o], dropout: 0}",
    )
    distiller, batches = make("objective.layers=[1]", *options)
    result = distiller.step(batches, 0)
    for part in "qkv":
        assert result.layers[part] == [None, pytest.approx(result.parts[part])]
    distiller, batches = make(*options)
    result = distiller.step(batches, 0)
    for part in "qkv":
        first, last = result.layers[part]
        assert (first + last) / 2 == pytest.approx(result.parts[part])
    compared = [x for x in result.layers["hidden"] if x is not None]
    assert sum(compared) == pytest.approx(result.parts["hidden"])
    assert [*result.gradient_norms] == ["q", "k", "v", "o"]
    square = sum(norm**2 for norm in result.gradient_norms.values())
    assert square == pytest.approx(result.gradient_norm**2, rel=1e-5)


def test_an_update_has_the_learning_rate_of_its_step(make):
    distiller, batches = make()
    # Two steps of warm-up to 0.01, and two thirds of a cosine of six steps to 0.9 of it.
    for number, expected in ((0, 0.005), (1, 0.01), (5, 0.00925)):
        result = distiller.step(batches, number)
        (rate,) = {group["lr"] for group in distiller.optimizer.param_groups}
        assert result.learning_rate == pytest.approx(expected) and rate == result.learning_rate


@pytest.mark.parametrize("clip", [1e-3, 0.0])
def test_the_norm_is_reported_before_clipping(clip, make):
    distiller, batches = make(f"optimizer.clip={clip}")
    torch.manual_seed(0)
    sums, counts = distiller.accumulate(batches, 0)
    norm = float(flat_gradient(distiller).norm())
    result = distiller.update(sums, counts, 0)
    assert result.gradient_norm == pytest.approx(norm) and norm > 1e-3
    after = float(flat_gradient(distiller).norm())
    assert after == pytest.approx(clip if clip else norm, rel=1e-2)


def poison(distiller) -> str:
    """Put a NaN into one gradient after every ``accumulate``; return the tensor's name."""
    accumulate, name = distiller.accumulate, sorted(distiller.student.trained)[3]

    def poisoned(batches, number):
        result = accumulate(batches, number)
        distiller.student.trained[name].grad.view(-1)[0] = float("nan")
        return result

    distiller.accumulate = poisoned
    return name


def test_a_gradient_that_is_not_finite_stops_the_run(make):
    distiller, batches = make()
    name = poison(distiller)
    with pytest.raises(UserError) as caught:
        distiller.step(batches, 6)
    sentence = str(caught.value)
    assert sentence.startswith("step 7: the loss is ")
    assert f"gradients are not finite on rank 0, in {name}: lower " in sentence
    assert sentence.endswith("lower optimizer.learning_rate, or set run.non_finite skip")


def test_a_loss_that_is_not_finite_skips_the_update(make, monkeypatch):
    """Every gradient is finite here."""
    distiller, batches = make("run.non_finite=skip")
    before = {name: value.clone() for name, value in distiller.student.trained.items()}
    means = distiller._global_means
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(distiller, "_global_means", lambda *args: (nan, means(*args)[1]))
    skipped = distiller.step(batches, 0).skipped
    assert skipped == "step 1: the loss is nan, though every gradient is finite"
    assert all(torch.equal(v, before[k]) for k, v in distiller.student.trained.items())


def test_an_update_that_is_skipped_changes_nothing(make):
    distiller, batches = make("run.non_finite=skip")
    before = {name: value.clone() for name, value in distiller.student.trained.items()}
    name = poison(distiller)
    result = distiller.step(batches, 0)
    assert f"in {name}" in result.skipped and "\n" not in result.skipped
    for key, value in distiller.student.trained.items():
        assert torch.equal(value, before[key]), key
    del distiller.accumulate
    assert distiller.step(batches, 1).skipped is None
    assert any(not torch.equal(v, before[k]) for k, v in distiller.student.trained.items())
