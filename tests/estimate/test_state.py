"""Weights, masters, moments, gradients and saved activations: estimated, and on a CPU.

The models are small and the steps are real. Activation checkpointing is on for the saved tensors,
because a CPU has no fused kernels, and would save more of a layer than a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megalard.config.schema import Config
from megalard.distill.student import Student
from megalard.estimate import memory
from megalard.estimate.memory import GRADIENTS, MASTERS, MOMENTS, STUDENT, TEACHER, stage_memory
from megalard.estimate.passes import ACTIVATIONS, RELATIONS_KIND, WORKING, Passes
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.sizes import Sizes
from megalard.estimate.weights import trained_of, trained_state, weights_of
from megalard.parallel.mesh import build_mesh
from megalard.training.step import Distiller
from tools.bench.random_model import random_spec
from tools.bench.random_run import make_config, make_distiller, random_batches

NO_RELATIONS = {f"objective.relations.{name}": 0 for name in "qkv"}
CASES = {
    "lora": {},
    "lora-o": {
        "trainable.lora.targets": "[q, k, v, o]",
        "objective.hidden_cosine": 1,
        "objective.hidden_depths": "[0.25, 0.5]",
    },
    "weights": {"trainable.mode": "weights", "trainable.weights": "[q, v]"},
    "all": {"trainable.mode": "all"},
    "all-cpt": {**NO_RELATIONS, "trainable.mode": "all", "objective.language_modelling": 1},
    "attention": {**NO_RELATIONS, "objective.attention_output": 1, "objective.layers": "[1, 3]"},
    "qk": {"objective.relations.qk": 1, "objective.layers": "[0, 2]"},
    "bf16": {"model.compute_dtype": "bfloat16"},
}


def made(case: str, shape: str) -> tuple[Config, Distiller]:
    settings = {"model.compute_dtype": "float32", "trainable.lora.rank": 8}
    settings |= {"trainable.lora.dropout": 0, "data.context_length": 32, "run.device": "cpu"}
    settings |= {"optimizer.global_batch": 2, "optimizer.micro_batch": 2} | CASES[case]
    config = make_config(settings)
    return config, make_distiller(config, random_spec(shape, 32), build_mesh("cpu", 1))


def size(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def weights_alone(student: Student, others) -> list[torch.Tensor]:
    known = {id(x) for x in others}
    return [x for x in student.decoder.parameters() if id(x) not in known]


@pytest.mark.parametrize("shape", ["tiny", "tiny-grouped"])
@pytest.mark.parametrize("case", CASES)
def test_the_state_between_steps_is_what_a_run_holds(case, shape):
    config, distiller = made(case, shape)
    spec, student = distiller.student.decoder.spec, distiller.student
    distiller.step(random_batches(config, spec, distiller.mesh), 0)
    kinds = stage_memory(config, 0, spec, RankLayout()).kinds
    trained, teacher = list(student.trained.values()), []
    if config.objective.needs_teacher:
        teacher = list(distiller.teacher.parameters())
    moments = [
        state[name]
        for state in distiller.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    assert kinds[TEACHER] == size(teacher)
    assert kinds[STUDENT] == size(weights_alone(student, [*teacher, *trained]))
    assert kinds[MASTERS] == size(trained)
    assert kinds[MOMENTS] == size(moments)
    assert kinds[GRADIENTS] == size(distiller.masters.gradients)


@pytest.mark.parametrize("shape", ["tiny", "tiny-grouped"])
@pytest.mark.parametrize("case", ["lora", "lora-o", "weights", "all", "attention", "qk", "bf16"])
def test_saved_tensors_are_what_autograd_keeps(case, shape):
    config, distiller = made(case, shape)
    spec = distiller.student.decoder.spec
    ((name, batches),) = random_batches(config, spec, distiller.mesh).items()
    objective, saved = distiller.objectives[name], {}
    parameters = {x.untyped_storage()._cdata for x in distiller.student.decoder.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        is_activation = x.ndim > 1 and x.is_floating_point() and storage._cdata not in parameters
        if is_activation and x.shape[-1] > 1:
            saved[storage._cdata] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        scale = torch.ones(len(objective.terms))
        objective(distiller.teacher, distiller.student.decoder, batches[0], scale)
    element = 2 if config.model.compute_dtype == "bfloat16" else 4
    sizes = Sizes(spec, config.all_streams()[name], RankLayout(), element)
    passes = Passes(sizes, trained_of(config, spec, RankLayout()), config.parallel, False)
    instant = passes.kept()
    assert instant[ACTIVATIONS] + instant[RELATIONS_KIND] == size(saved.values())


def test_the_state_is_divided_over_data_ranks():
    """Without division there is no copy in the compute dtype, and with it every rank has one."""
    whole, shared = trained_state(1001, 2, 1), trained_state(1001, 2, 4)
    assert (whole.gathered, whole.masters, whole.moments, whole.gradients) == (0, 4004, 8008, 4004)
    assert (shared.gathered, shared.masters) == (2002, 4 * 251)
    assert (shared.moments, shared.gradients) == (8 * 251, 4 * 251)


def test_division_is_one_function(monkeypatch):
    """With it, memory falls by the divided state, and rises by the weights that are gathered."""
    config = make_config({"trainable.mode": "all", "data.context_length": 4096})
    spec, layout = random_spec("llama2-7b", 4096), RankLayout(dp=8)
    before = stage_memory(config, 0, spec, layout)
    monkeypatch.setattr(memory, "data_ranks_sharing_state", lambda config, layout: layout.data)
    after = stage_memory(config, 0, spec, layout)
    for kind in (MASTERS, MOMENTS, GRADIENTS):
        assert after.kinds[kind] == pytest.approx(before.kinds[kind] / 8, rel=1e-6)
    assert after.kinds[STUDENT] == before.kinds[MASTERS] / 2
    # The weights of the last layer that is computed again are no longer cast. At the peak, the cast
    # of the last projection is released already.
    names = [name for name in weights_of(spec, layout) if ".layers.30." in name]
    casts = 2 * sum(weights_of(spec, layout)[n] for n in names if "down_proj" not in n)
    assert before.kinds[WORKING] - after.kinds[WORKING] == pytest.approx(casts, rel=1e-3)
