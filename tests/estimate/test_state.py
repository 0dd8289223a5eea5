"""Weights, masters, moments, gradients and saved activations: estimated, and on a CPU.

The models are small and the steps are real. Activation checkpointing is on for the saved tensors,
because a CPU has no fused kernels, and would save more of a layer than a GPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megalard.config.schema import Config, ParallelConfig
from megalard.distill.student import Student
from megalard.estimate.buckets import Buckets
from megalard.estimate.host import HOST
from megalard.estimate.memory import (
    GRADIENTS,
    MASTERS,
    MOMENTS,
    STUDENT,
    TEACHER,
    stage_memory,
)
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.saved import ACTIVATIONS, RELATIONS_KIND, MicroBatch
from megalard.estimate.sizes import Sizes
from megalard.estimate.trained import Trained, TrainedState, TrainedTensor, trained_state
from megalard.estimate.weights import trained_of
from megalard.model.spec import spec_from_config
from megalard.parallel.mesh import build_mesh
from megalard.training.estimated import state_bytes
from megalard.training.step import Distiller
from tests.ranks import run_ranks
from tools.bench.random_model import random_config, random_spec
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
    ids_of_others = {id(x) for x in others}
    return [x for x in student.decoder.parameters() if id(x) not in ids_of_others]


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
    trained = trained_of(config, spec, RankLayout())
    buckets = Buckets(trained, config.parallel, element, is_repeated=False)
    instant = MicroBatch(sizes, trained, buckets, config.parallel, False).kept()
    assert instant[ACTIVATIONS] + instant[RELATIONS_KIND] == size(saved.values())


WORLDS = {
    2: ("tiny", [{"dp": 2}, {"cp": 2}, {"tp": 2}]),
    # Two K/V heads, each on two tp ranks.
    4: ("tiny-grouped", [{"tp": 4}]),
}
DIVIDED = {
    "lora": {},
    "lora-o": {"trainable.lora.targets": "[q, k, v, o]"},
    "all-bf16-gradients": {"trainable.mode": "all", "parallel.gradient_dtype": "bfloat16"},
    "weights-offloaded": {"trainable.mode": "weights", "parallel.offload_optimizer": True},
    "whole": {"trainable.mode": "all", "parallel.shard_optimizer": False},
    "lora-weights": {"parallel.shard_weights": True},
    "all-weights": {"trainable.mode": "all", "parallel.shard_weights": True},
    "q-weights": {"trainable.mode": "weights", "parallel.shard_weights": True},
}


def check_divided_state(shape: str, layouts: list[dict[str, int]]) -> None:
    """Compare rank 0 with the estimate; every rank of torchrun calls this."""
    for sizes, case in itertools.product(layouts, DIVIDED):
        cp, tp = sizes.get("cp", 1), sizes.get("tp", 1)
        settings = {"model.compute_dtype": "bfloat16", "parallel.tp": tp, "parallel.cp": cp}
        settings |= {"trainable.lora.rank": 6, "data.context_length": 32, "run.device": "cpu"}
        settings |= {"optimizer.global_batch": 2, "optimizer.micro_batch": 1} | DIVIDED[case]
        config = make_config(settings)
        # What a layer holds does not depend on how many there are.
        native = spec_from_config(random_config(shape, 32) | {"num_hidden_layers": 2}, shape)
        distiller = make_distiller(config, native, build_mesh("cpu", tp, cp))
        spec = distiller.student.decoder.spec
        distiller.step(random_batches(config, spec, distiller.mesh), 0)
        memory = stage_memory(config, 0, spec, RankLayout(**sizes))
        if distiller.mesh.is_rank_0:
            estimated = memory.kinds + memory.host
            measured = state_bytes(distiller)
            assert measured == {kind: estimated[kind] for kind in measured}, (sizes, case)
            state = {HOST} if case == "weights-offloaded" else {MASTERS, MOMENTS}
            assert set(measured) == {TEACHER, STUDENT, GRADIENTS} | state


@pytest.mark.parametrize("world", WORLDS)
def test_divided_state_is_what_rank_0_holds(world):
    """Over dp and cp, and over tp where ranks hold the same norms, LoRA's A and K/V heads."""
    run_ranks(world, check_divided_state, *WORLDS[world])


def test_a_share_has_equally_many_rows_on_each_holder():
    """Ten rows on four ranks are three rows of seven elements; a plain tensor has all of them."""
    divided, plain = TrainedTensor((10, 7), 4, True), TrainedTensor((10, 7), 4, False)
    assert (divided.elements, divided.share) == (70, 21)
    assert (plain.elements, plain.share) == (70, 70)
    trained = Trained({"model.norm.weight": divided, "lm_head.weight": plain}, 0)
    bf16 = ParallelConfig(gradient_dtype="bfloat16")
    assert trained_state(trained, bf16, 2) == TrainedState(
        weights=2 * 70,
        masters=4 * (21 + 70),
        moments=8 * (21 + 70),
        gradients=2 * 21 + 4 * 70,
        host=0,
    )
    # On the host: master, two moments, and the gradient in fp32.
    trained = Trained({"model.norm.weight": divided}, 0)
    offloaded = ParallelConfig(offload_optimizer=True)
    assert trained_state(trained, offloaded, 2) == TrainedState(2 * 70, 0, 0, 4 * 21, 16 * 21)


def test_replicas_over_tp_are_holders():
    """LoRA's A of q is on all four tp ranks, k's B on two of them, and q's B on one."""
    spec = random_spec("tiny-grouped", 64)
    config = make_config({"trainable.lora.rank": 8})
    tensors = trained_of(config, spec, RankLayout(dp=3, tp=4)).tensors
    prefix = "model.layers.0.self_attn."
    for name, holders in (("q_proj.lora_A", 12), ("k_proj.lora_B", 6), ("q_proj.lora_B", 3)):
        assert tensors[prefix + name].holders == holders
    alone = trained_of(config, spec, RankLayout(tp=4)).tensors
    assert alone[prefix + "q_proj.lora_A"].is_divided
    assert not alone[prefix + "q_proj.lora_B"].is_divided
