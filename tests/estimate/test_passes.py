"""The formulae of memory against the bytes that the trainer's code allocates on the meta device.

The formulae share no code with the trainer. Attention, relations, RoPE, SwiGLU and norms are
stand-ins that allocate and save what the kernels of a GPU allocate and save.
"""

from __future__ import annotations

import pytest

from megalard.config.schema import Config
from megalard.estimate.memory import BATCH, WORKSPACES, Memory, stage_memory
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
    "all-cpt-128k": (
        {**CPT, "data.context_length": 131072},
        {"cp": 2, "tp": 4, "shape": "llama3-8b"},
    ),
}
# What the formulae leave out: masks, scalars, and tensors that Python drops a instant later.
TOLERANCE = 0.025


def configured(changes: dict) -> Config:
    settings = {
        "trainable.lora.rank": 1024,
        "trainable.lora.dropout": 0.0,
        "parallel.activation_checkpointing": True,
    }
    settings |= changes
    settings["optimizer.global_batch"] = settings.get("optimizer.micro_batch", 1)
    return make_config(settings)


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_the_step_allocates(case, monkeypatch):
    meta_kernels.install(monkeypatch)
    changes, model = CASES[case]
    model = dict(model)
    layout = RankLayout(1, model.pop("cp", 1), model.pop("tp", 1))
    config_layout = {"parallel.cp": layout.cp, "parallel.tp": layout.tp}
    config = configured({**changes, **config_layout})
    window = config.data.context_length
    spec = shape(model.pop("shape", "llama2-7b"), 4, window, **model)
    step = run_step(config, spec, layout)
    memory = stage_memory(config, 0, spec, layout)
    between = memory.between_steps - memory.kinds[BATCH] - memory.kinds[WORKSPACES]
    moments = memory.kinds["moments of AdamW"]
    has_teacher = config.all_streams()["main"].objective.needs_teacher
    freed = 0 if has_teacher else step.weights  # the run drops a teacher that no stage needs
    assert between - moments == pytest.approx(step.weights + step.state - freed, rel=1e-3)
    assert memory.kinds[BATCH] == pytest.approx(step.batch, rel=0.01)
    assert peak(memory) == pytest.approx(step.peak, rel=TOLERANCE), memory.instant


def peak(memory: Memory) -> int:
    return memory.total - memory.between_steps
