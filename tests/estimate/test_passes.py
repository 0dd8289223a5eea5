"""The formulae of memory against the bytes that the trainer's code allocates on the meta device.

The formulae share no code with the trainer. Attention, relations, RoPE, SwiGLU and norms are
stand-ins that allocate and save what the kernels of a GPU allocate and save.
"""

from __future__ import annotations

import math

import pytest

from megalard.config.schema import Config
from megalard.estimate.host import HOST, SAVED
from megalard.estimate.memory import BATCH, MOMENTS, WORKSPACES, stage_memory
from megalard.estimate.rank_layout import RankLayout
from tests.estimate import meta_kernels
from tests.estimate.meta_step import run_step, shape
from tools.bench.random_run import make_config

NO_RELATIONS = {f"objective.relations.{name}": 0 for name in "qkv"}
CPT = {**NO_RELATIONS, "objective.language_modelling": 1, "trainable.mode": "all"}
LOGITS = {**NO_RELATIONS, "objective.logits_kl": 1}
QK = {**NO_RELATIONS, "objective.relations.qk": 1}
HIDDEN = {
    **NO_RELATIONS,
    "objective.hidden_cosine": 1,
    "objective.hidden_depths": "[0.25, 0.5, 0.75, 1.0]",
}
NOT_AGAIN = {"parallel.activation_checkpointing": False}
OFFLOAD = {"parallel.offload": True}
FOUR_BLOCKS = {"optimizer.micro_batch": 4}
DIVIDED_BF16 = {"parallel.gradient_dtype": "bfloat16"}
HOST_STATE = {"parallel.offload_optimizer": True}
LORA_O = {"trainable.lora.targets": "[q, k, v, o]"}

CASES = {
    "lora": ({}, {}),
    "lora-not-again": (NOT_AGAIN, {}),
    "lora-dropout": ({**NOT_AGAIN, "trainable.lora.dropout": 0.05}, {}),
    "lora-tp2": ({**NOT_AGAIN, **FOUR_BLOCKS}, {"tp": 2}),
    "lora-tp4": (FOUR_BLOCKS, {"tp": 4}),
    "lora-cp2-32k": ({"data.context_length": 32768}, {"cp": 2}),
    "lora-cp4-64k": ({"data.context_length": 65536}, {"cp": 4}),
    "lora-cp8-64k-not-again": ({**NOT_AGAIN, "data.context_length": 65536}, {"cp": 8}),
    "lora-offload": ({**OFFLOAD, "data.context_length": 32768}, {}),
    "lora-offload-8b-cp2": (
        {**OFFLOAD, "data.context_length": 49152},
        {"cp": 2, "shape": "llama3-8b", "layers": 6},
    ),
    "lora-offload-not-again": ({**OFFLOAD, **NOT_AGAIN}, {}),
    "lora-fp32": ({**NOT_AGAIN, "model.compute_dtype": "float32"}, {}),
    "qk-and-others": ({**NOT_AGAIN, "objective.relations.qk": 1}, {}),
    "qk-grouped-8b": ({**NOT_AGAIN, **QK}, {"shape": "llama3-8b"}),
    "logits-lora-o": ({**NOT_AGAIN, **LOGITS, **LORA_O}, {}),
    "logits-cp2-8b": ({**LOGITS, "data.context_length": 16384}, {"cp": 2, "shape": "llama3-8b"}),
    "attention-output": ({**NOT_AGAIN, "objective.attention_output": 1}, {}),
    "longred": ({**HIDDEN, "trainable.mode": "all"}, {"tie_word_embeddings": True}),
    "weights": ({"trainable.mode": "weights"}, {}),
    "all-relations-tp2": ({"trainable.mode": "all", **FOUR_BLOCKS}, {"tp": 2}),
    "all-cpt-16k": ({**CPT, "data.context_length": 16384}, {}),
    # The peak is in the backward pass of attention.
    "all-cpt-cp8-64k": ({**CPT, "data.context_length": 65536}, {"cp": 8}),
    "all-cpt-128k": (
        {**CPT, "data.context_length": 131072},
        {"cp": 2, "tp": 4, "shape": "llama3-8b"},
    ),
    "all-dp2": (CPT, {"dp": 2}),
    "all-dp2-not-again": ({**CPT, **NOT_AGAIN}, {"dp": 2}),
    "all-dp2-eight-layers": (CPT, {"dp": 2, "layers": 8}),
    "all-dp2-fp32": ({**CPT, "model.compute_dtype": "float32"}, {"dp": 2}),
    "all-dp2-whole": ({**CPT, "parallel.shard_optimizer": False}, {"dp": 2}),
    "all-dp2-bf16-gradients": ({**CPT, **DIVIDED_BF16}, {"dp": 2}),
    "all-dp8-bf16-gradients": ({**CPT, **DIVIDED_BF16}, {"dp": 8}),
    "all-dp4-8b": (CPT, {"dp": 4, "shape": "llama3-8b"}),
    "all-dp4-8b-two-micro-batches": (
        {**CPT, "optimizer.global_batch": 8},
        {"dp": 4, "shape": "llama3-8b"},
    ),
    "all-dp4-8b-tied": (CPT, {"dp": 4, "shape": "llama3-8b", "tie_word_embeddings": True}),
    "all-cp2-tp2-8b": (
        {**CPT, "data.context_length": 8192},
        {"cp": 2, "tp": 2, "shape": "llama3-8b"},
    ),
    "all-host-state": ({**CPT, **HOST_STATE}, {}),
    "all-host-state-dp2": ({**CPT, **HOST_STATE}, {"dp": 2}),
    "lora-dp2-four-micro-batches": ({"optimizer.global_batch": 8}, {"dp": 2, "layers": 8}),
    # Norms after attention and the MLP, and a norm of q and k over all features.
    "all-cpt-olmo2": ({**CPT, **NOT_AGAIN}, {"model_type": "olmo2"}),
    "all-cpt-olmo2-tp2": ({**CPT, **NOT_AGAIN}, {"model_type": "olmo2", "tp": 2, "layers": 8}),
    "lora-olmo2-tp2": (NOT_AGAIN, {"model_type": "olmo2", "tp": 2}),
    # A norm of q and k within each head.
    "all-cpt-qwen3": (CPT, {"model_type": "qwen3", "shape": "llama3-8b"}),
    "lora-qwen3-tp2": (NOT_AGAIN, {"model_type": "qwen3", "shape": "llama3-8b", "tp": 2}),
    "weights-dp4": ({"trainable.mode": "weights"}, {"dp": 4}),
}
# What the formulae leave out: masks, scalars, and tensors that Python drops an instant later.
TOLERANCE = 0.025


def configured(changes: dict, dp: int = 1) -> Config:
    settings = {
        "trainable.lora.rank": 1024,
        "trainable.lora.dropout": 0.0,
        "parallel.activation_checkpointing": True,
    }
    settings |= changes
    settings.setdefault("optimizer.global_batch", settings.get("optimizer.micro_batch", 1) * dp)
    return make_config(settings)


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_the_step_allocates(case, monkeypatch):
    meta_kernels.install(monkeypatch)
    changes, model = CASES[case]
    model = dict(model)
    layout = RankLayout(*(model.pop(axis, 1) for axis in ("dp", "cp", "tp")))
    config_layout = {"parallel.cp": layout.cp, "parallel.tp": layout.tp}
    config = configured({**changes, **config_layout}, layout.dp)
    window, layers = config.data.context_length, model.pop("layers", 4)
    spec = shape(model.pop("shape", "llama2-7b"), layers, window, **model)
    step = run_step(config, spec, layout)
    memory = stage_memory(config, 0, spec, layout, repeats_kv=False)
    between = memory.between_steps - memory.kinds[BATCH] - memory.kinds[WORKSPACES]
    has_teacher = config.all_streams()["main"].objective.needs_teacher
    freed = 0 if has_teacher else step.weights  # the run drops a teacher that no stage needs
    expected = step.weights + step.state - freed
    assert between - memory.kinds[MOMENTS] == pytest.approx(expected, rel=1e-3)
    micro_batches = config.optimizer.global_batch // (config.optimizer.micro_batch * layout.dp)
    assert memory.kinds[BATCH] == pytest.approx(step.batch * micro_batches, rel=0.01)
    largest = max(step.peak, step.update)
    assert memory.total - memory.between_steps == pytest.approx(largest, rel=TOLERANCE), (
        memory.instant
    )
    assert step.after < 2**20, "nothing but the state is left after a step"
    assert memory.host[HOST] == step.host
    assert memory.host[SAVED] == pytest.approx(sum(step.offloaded), rel=TOLERANCE)
    if step.offloaded and config.parallel.activation_checkpointing:
        pinned = sum(2 ** math.ceil(math.log2(size)) for size in step.offloaded)
        assert memory.host.total() == pytest.approx(pinned, rel=TOLERANCE)
