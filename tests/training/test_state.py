"""The state of a stage: names, layouts, and a restored state that goes on as the saved one."""

from __future__ import annotations

import pytest
import torch

from megalard.checkpoint.sharded.read import ShardedWeights
from megalard.checkpoint.sharded.save_load import save_sharded
from megalard.checkpoint.write_options import WriteOptions
from megalard.errors import UserError
from megalard.parallel.mesh import SINGLE
from megalard.training.models import load_models, next_student
from megalard.training.state import optimizer_settings, restore_state, training_state
from megalard.training.step import Distiller
from megalard.training.streams import make_loaders, open_streams

A = "model.layers.0.self_attn.q_proj.lora_A"


@pytest.fixture
def make(planned, tmp_path):
    """A function that makes a distiller and a function that takes its steps."""

    def make(*options: str):
        run = planned(*options)
        stage = run.stages[0]
        teacher, student = load_models(stage, run.plan, run.mesh)
        distiller = Distiller(teacher, student, stage.config, run.mesh)
        stores = open_streams(run.stages, tmp_path / "tokens", run.plan, run.mesh)

        def take(*numbers: int) -> list[float]:
            with make_loaders(stage, stores, run.plan, run.mesh) as loaders:
                return [
                    distiller.step(loaders.step(number, run.mesh.device), number).loss
                    for number in numbers
                ]

        return distiller, take

    return make


def save(distiller, folder) -> ShardedWeights:
    """Write the state as a checkpoint."""
    settings = optimizer_settings(distiller.optimizer)
    training = {"optimizer": {"class": "AdamW", "groups": settings}}
    state = training_state(distiller)
    tensors = {name: part.as_tensor(distiller.mesh) for name, part in state.items()}
    sections = {
        "kind": "training",
        "config": {},
        "base": {"path": "/base", "files": {}},
        "trained": {},
        "training": training,
        "written_by": {"ranks": 1},
    }
    save_sharded(folder, tensors, sections, SINGLE, WriteOptions())
    return ShardedWeights(folder)


def test_the_state_is_weights_moments_and_generators(make):
    distiller, take = make()
    take(0)
    state = training_state(distiller)
    weights = {name for name in state if not name.startswith(("optimizer.", "rng."))}
    assert weights == set(distiller.student.trained) and len(weights) == 12
    moments = {f"optimizer.{key}.{name}" for name in weights for key in ("exp_avg", "exp_avg_sq")}
    steps = {f"optimizer.step.{name}" for name in weights}
    assert set(state) == weights | moments | steps | {"rng.cpu.00000"}
    part = state[f"optimizer.exp_avg.{A}"]
    assert part.value.shape == (4, 32) and part.held.full_shape == (4, 32)
    # Live tensors and not copies; what is equal on all ranks has no slice.
    moment = distiller.optimizer.state[distiller.student.trained[A]]["exp_avg"]
    assert part.value.data_ptr() == moment.data_ptr()
    assert state[f"optimizer.step.{A}"].held is None and state["rng.cpu.00000"].held is None


@pytest.mark.parametrize("offload", [("false", "false"), ("true", "true"), ("true", "false")])
def test_a_restored_state_goes_on_as_the_saved_one(offload, make, tmp_path):
    before, after = (f"parallel.offload_optimizer={value}" for value in offload)
    distiller, take = make(before)
    take(0, 1)
    weights = save(distiller, tmp_path / "checkpoint")
    random_numbers = torch.rand(3)
    expected = take(2, 3)
    other, take_other = make(after)
    torch.manual_seed(7)
    restore_state(other, weights, SINGLE)
    assert torch.equal(torch.rand(3), random_numbers)
    assert take_other(2, 3) == expected
    distiller.student.complete()
    other.student.complete()
    for name, parameter in distiller.student.trained.items():
        assert torch.equal(other.student.trained[name], parameter), name


def test_the_settings_of_the_optimizer_are_plain_values(make):
    distiller, _ = make("optimizer.weight_decay=0.25")
    (group,) = optimizer_settings(distiller.optimizer)
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.25, (0.9, 0.95), 0.01)
    assert "params" not in group


def test_other_trained_tensors_are_refused(make, tmp_path):
    distiller, take = make()
    take(0)
    weights = save(distiller, tmp_path / "checkpoint")
    other, _ = make("trainable.lora={targets: [q], rank: 4, alpha: 8}")
    with pytest.raises(UserError, match=r"holds other trained tensors than this run, such as .*k_"):
        restore_state(other, weights, SINGLE)


def test_another_optimizer_is_refused(make, tmp_path):
    distiller, take = make()
    take(0)
    weights = save(distiller, tmp_path / "checkpoint")
    weights.manifest.training["optimizer"]["class"] = "FusedAdam"
    other, _ = make()
    with pytest.raises(UserError, match="with the optimizer 'FusedAdam', whose state this version"):
        restore_state(other, weights, SINGLE)


def test_weights_of_earlier_stages_are_part_of_the_state(planned):
    run = planned("stages={a: {}, b: {trainable: {mode: weights, weights: [q]}}}")
    teacher, first = load_models(run.stages[0], run.plan, run.mesh)
    second = next_student(first, run.stages[1], run.plan, run.mesh)
    distiller = Distiller(teacher, second, run.stages[1].config, run.mesh)
    names = {name for name in training_state(distiller) if not name.startswith("rng.")}
    expected = {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(2) for p in "qkv"}
    assert names == expected
