"""PEFT adapters: written from a run, read by peft and by megalard, and bad ones refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megalard.checkpoint.compare import logits_of, tensor_differences
from megalard.checkpoint.open import open_model
from megalard.checkpoint.peft import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterWeights,
    adapter_config,
    adapter_name,
)
from megalard.training.run_folder import checkpoint_path
from tests.command_line import user_error
from tests.conversions import (
    LAYER,
    Q_PROJ,
    export_another_norm_eps,
    lora_pair,
    make_adapter,
    to_adapter,
    to_hugging_face,
    to_sharded,
)
from tests.jobs import arguments, flip_bit, make_job, train
from tests.logits import assert_same_logits, random_tokens
from tests.old_transformers import logits_of_transformers_4
from tests.ranks import run_ranks

SAVE = ("checkpoint.save_every=4", "optimizer.steps=4")
RUNS = {
    "linear": (2, ("parallel.tp=2",)),
    "yarn": (1, ("rope.type=yarn", "trainable.lora={targets: [q, o], rank: 6, alpha: 9}")),
    "some-layers": (1, ("objective.layers=[0, 1]", "rope.type=longrope")),
    "one-relation": (1, ("objective.relations.q=0", "objective.relations.k=0", "rope.type=abf")),
    "weights": (1, ("trainable.mode=weights", "rope.type=llama3")),
}
LORA_RUNS = [name for name in RUNS if name != "weights"]
TOKENS = random_tokens(1, 90, 257)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each kind, with its exports in its directory."""
    folder = make_job(tmp_path_factory.mktemp("peft"))
    for name, (ranks, options) in RUNS.items():
        run_ranks(ranks, train, arguments(folder, folder / name, *SAVE, *options))
        to_hugging_face(checkpoint_of(folder, name), folder / name / "merged")
        if name != "weights":
            to_adapter(checkpoint_of(folder, name), folder / name / "adapter")
    return folder


def checkpoint_of(runs: Path, name: str) -> Path:
    """Return the last checkpoint of a run."""
    return checkpoint_path(runs / name / "checkpoints", 4)


def trainer_logits(runs: Path, name: str) -> torch.Tensor:
    """Return the trainer's logits, [1, tokens, vocabulary]."""
    return logits_of(open_model(checkpoint_of(runs, name)), TOKENS[0], torch.float32)[None]


@pytest.mark.parametrize("name", RUNS)
def test_the_merged_export_is_the_run_s_student(name, runs):
    merged, student = open_model(runs / name / "merged"), open_model(runs / name / "student")
    assert tensor_differences(merged, student) == []
    assert merged.spec == student.spec
    assert {p.name for p in (runs / name / "merged").iterdir()} == {
        p.name for p in (runs / name / "student").iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(runs / name / "merged", dtype=torch.float64)
    with torch.no_grad():
        assert_same_logits(trainer_logits(runs, name), model(TOKENS, use_cache=False).logits)
    assert AutoTokenizer.from_pretrained(runs / name / "merged").eos_token == "</s>"


def test_transformers_4_gives_the_trainer_s_logits(runs):
    folders = [runs / name / "merged" for name in RUNS]
    theirs = logits_of_transformers_4(folders, [TOKENS], runs / "texts.pt")
    for name, folder in zip(RUNS, folders, strict=True):
        assert_same_logits(trainer_logits(runs, name), theirs[folder][0])


@pytest.mark.parametrize("name", LORA_RUNS)
def test_peft_gives_the_trainer_s_logits_on_the_base_with_the_student_s_config(name, runs):
    from peft import PeftModel

    adapter = runs / name / "adapter"
    base = json.loads((adapter / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    assert base == str(runs / "model")
    config = AutoConfig.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float64)
    model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model(TOKENS, use_cache=False).logits
        assert_same_logits(trainer_logits(runs, name), logits)
        # An adapter carries no RoPE. Without the student's config it is another model.
        native = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        native = PeftModel.from_pretrained(native, adapter)
        other = native(TOKENS, use_cache=False).logits
    assert float((other - logits).norm() / logits.norm()) > 1e-2


@pytest.mark.parametrize("name", ["linear", "some-layers", "one-relation"])
def test_an_adapter_is_read_as_the_merged_model(name, runs):
    adapter = open_model(runs / name / "adapter")
    merged = open_model(runs / name / "merged")
    assert tensor_differences(adapter, merged) == []
    assert adapter.spec.rope == merged.spec.rope


def test_a_run_without_lora_pairs_has_no_adapter(runs, tmp_path):
    sentence = user_error(to_adapter, checkpoint_of(runs, "weights"), tmp_path / "adapter")
    assert "trained weights (trainable.mode weights), not LoRA pairs" in sentence
    sentence = user_error(to_adapter, runs / "model", tmp_path / "adapter")
    assert sentence == (
        f"{runs / 'model'} is not a run's checkpoint (huggingface): there is no adapter in it"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_s_checkpoint_becomes_a_full_sharded_model(runs, tmp_path):
    to_sharded(checkpoint_of(runs, "linear"), tmp_path / "full")
    full = open_model(tmp_path / "full")
    assert full.kind == "sharded" and full.base is None
    assert tensor_differences(full, open_model(runs / "linear" / "student")) == []


def test_a_damaged_checkpoint_gives_no_adapter(runs, tmp_path):
    """The checksums are compared before the directory gets its name."""
    copy = shutil.copytree(checkpoint_of(runs, "linear"), tmp_path / "copy")
    shard = next(copy.glob("weights-*.safetensors"))
    flip_bit(shard)
    assert f"{shard} is damaged" in user_error(to_adapter, copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_adapter_that_reads_as_another_model_is_refused(runs, tmp_path, monkeypatch):
    export_another_norm_eps(monkeypatch)
    sentence = user_error(to_adapter, checkpoint_of(runs, "linear"), tmp_path / "out")
    assert "its norm_eps is read as 0.5" in sentence and list(tmp_path.iterdir()) == []


def test_the_config_names_kinds_and_layers_where_that_is_enough():
    trained = {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}}

    def config_of(*modules: str) -> dict:
        names = [
            "model.layers.{}.self_attn.{}_proj.lora_{}".format(*module.split("."), part)
            for module in modules
            for part in "AB"
        ]
        return adapter_config(trained, names, "/base")

    regular = config_of("0.q", "0.v", "2.q", "2.v")
    assert regular["target_modules"] == ["q_proj", "v_proj"]
    assert regular["layers_to_transform"] == [0, 2] and regular["layers_pattern"] == "layers"
    assert (regular["r"], regular["lora_alpha"], regular["lora_dropout"]) == (4, 8.0, 0.1)
    assert regular["base_model_name_or_path"] == "/base" and not regular["use_rslora"]
    irregular = config_of("0.q", "1.q", "1.v")
    assert irregular["layers_to_transform"] is None
    assert irregular["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert adapter_name("model.layers.0.self_attn.q_proj.lora_A") == f"{Q_PROJ}.lora_A.weight"


BAD_ADAPTERS = {
    "no rank": ({"r": None}, None, "has no r: set it to the value that the adapter was trained"),
    "rank 0": ({"r": 0}, None, "has 0 as r: set it"),
    "rank as text": ({"r": "2"}, None, "has '2' as r: set it"),
    "no alpha": ({"lora_alpha": None}, None, "has no lora_alpha: set it"),
    "alpha nan": ({"lora_alpha": float("nan")}, None, "has nan as lora_alpha: set it"),
    "a list": ([], None, f"{ADAPTER_CONFIG} does not contain a JSON object"),
    "another type": ({"peft_type": "LOHA"}, None, "not plain LoRA (it has peft_type 'LOHA')"),
    "a variant": ({"use_dora": True}, None, "not plain LoRA (it sets use_dora)"),
    "transposed": ({"fan_in_fan_out": True}, None, "not plain LoRA (it sets fan_in_fan_out)"),
    "another rank": ({"r": 3}, None, f"{Q_PROJ}.lora_A.weight in "),
    "A alone": (
        None,
        {f"{Q_PROJ}.lora_A.weight": torch.ones(2, 32)},
        "q_proj.lora_A.weight without its lora_B",
    ),
    "B alone": (
        None,
        {f"{Q_PROJ}.lora_B.weight": torch.ones(32, 2)},
        "q_proj.lora_B.weight without its lora_A",
    ),
    "of another base": (
        {"init_lora_weights": "pissa_niter_4"},
        None,
        "init_lora_weights 'pissa_niter_4', which changes the base model",
    ),
    "no tensors": (None, {}, "has no tensors, so it changes nothing"),
    "not LoRA": (
        None,
        {f"{LAYER}mlp.up_proj.weight": torch.ones(2, 2)},
        "which is not part of a LoRA pair",
    ),
    "a shape": (
        None,
        lora_pair(f"{LAYER}mlp.up_proj", rows=32),
        "up_proj.weight of shape [32, 32], but",
    ),
    "a vector": (
        None,
        {f"{Q_PROJ}.lora_A.weight": torch.ones(2), f"{Q_PROJ}.lora_B.weight": torch.ones(2)},
        "which does not fit the rank r = 2",
    ),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_when_it_is_opened(case, runs, tmp_path):
    config, tensors, sentence = BAD_ADAPTERS[case]
    adapter = make_adapter(tmp_path / "adapter", runs / "model", config, tensors)
    message = user_error(open_model, adapter)
    assert sentence in message and str(adapter) in message


def test_a_truncated_adapter_is_refused(runs, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", runs / "model")
    file = adapter / ADAPTER_WEIGHTS
    file.write_bytes(file.read_bytes()[:-5])
    assert f"{file} is truncated or damaged" in user_error(open_model, adapter)
    (adapter / ADAPTER_CONFIG).write_text("{ cut")
    assert f"{adapter / ADAPTER_CONFIG} is damaged: it is not JSON" in user_error(
        open_model, adapter
    )


def test_pairs_are_read_in_fp32_under_the_trainer_s_names(runs, tmp_path):
    pair = {name: value.bfloat16() for name, value in lora_pair(Q_PROJ).items()}
    adapter = make_adapter(tmp_path / "adapter", runs / "model", {"lora_alpha": 3}, pair)
    weights = AdapterWeights(adapter)
    name = "model.layers.0.self_attn.q_proj.lora_B"
    assert weights.scale == 1.5 and weights.shape(name) == (32, 2)
    assert weights.read(name).dtype == torch.float32 and weights.dtype(name) == torch.bfloat16
    assert weights.files() == [adapter / ADAPTER_WEIGHTS]
    assert torch.equal(weights.read(name), torch.ones(32, 2))


def test_an_adapter_is_on_the_disk_before_it_has_its_name(runs, tmp_path, monkeypatch):
    """Every file, and the directory that holds their names."""
    events, fsync, rename = [], os.fsync, Path.rename

    def noting_fsync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noting_rename(self, target):
        events.append(f"rename {self.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    to_adapter(checkpoint_of(runs, "linear"), tmp_path / "adapter")
    written = events[: events.index("rename adapter.partial")]
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json"} < files
    assert files | {"adapter.partial"} <= set(written)
