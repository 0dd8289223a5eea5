"""Runs on directories as people have them: what is exported is what was trained, and complete."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command_line import megalard, refusal
from tests.jobs import arguments, make_job
from tests.logits import random_tokens, relative_error, transformers_logits
from tests.models import change_config, make_model
from tests.small_tokenizers import save_byte_tokenizer

TOKENS = random_tokens(2, 40, 200)
# A step that changes nothing: the student is then its initial weights under the written config.
STILL = ("optimizer.learning_rate=1e-30", "optimizer.steps=1", "optimizer.warmup_steps=0")
M, STUDENT = 64, 256


@pytest.fixture
def job(tmp_path) -> Path:
    return make_job(tmp_path, layers=3)


@pytest.fixture
def train(job, tmp_path):
    """A function that runs a still run and returns the directory of its student."""

    def run(*overrides: str, teacher: Path | None = None) -> Path:
        number = len(list(tmp_path.glob("run-*")))
        output = tmp_path / f"run-{number}"
        given = [*STILL, *overrides]
        if teacher is not None:
            given.append(f"model.teacher={teacher}")
        assert megalard("train", *arguments(job, output, *given)) == 0
        return output / "student"

    return run


def make(folder: Path, family: str = "llama", seed: int = 0, **changes) -> Path:
    """Write a model with the tokenizer of the job."""
    make_model(family, folder, seed, **{"vocab_size": 257, **changes})
    save_byte_tokenizer(folder)
    return folder


def config_of(model: Path) -> dict:
    return json.loads((model / "config.json").read_text())


def under_config_of(student: Path, weights: Path, folder: Path) -> torch.Tensor:
    """Return the logits of other weights under the config of a student."""
    shutil.copytree(weights, folder)
    shutil.copy(student / "config.json", folder)
    return transformers_logits(folder, TOKENS)


def assert_exported(student: Path, weights: Path, folder: Path) -> None:
    expected = under_config_of(student, weights, folder)
    # The step adds 1e-30 at most, and LoRA's B is zero.
    assert relative_error(transformers_logits(student, TOKENS), expected) < 1e-6


def rope(model: Path, **entries) -> None:
    config = config_of(model)
    config.pop("rope_parameters", None)
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 1e4} | entries))


@pytest.mark.parametrize("mode", ["lora", "weights", "all"])
def test_a_head_of_its_own_of_a_tied_model_is_exported(mode, train, tmp_path):
    model = make(tmp_path / "tied", "llama-tied")
    tensors = load_file(model / "model.safetensors")
    head = torch.randn(257, 32, generator=torch.Generator().manual_seed(5)) * 0.2
    save_file(tensors | {"lm_head.weight": head}, model / "model.safetensors", {"format": "pt"})
    student = train(f"trainable.mode={mode}", "objective.logits_kl=1", teacher=model)
    assert_exported(student, model, tmp_path / "reference")
    assert config_of(student)["tie_word_embeddings"] is False


def test_the_weights_of_a_stale_index_are_not_trained(train, tmp_path):
    newer = make(tmp_path / "newer", seed=1)
    model = make(tmp_path / "model")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    names = load_file(model / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(newer / "model.safetensors", model)
    assert_exported(train(teacher=model), newer, tmp_path / "reference")


def test_ministral_is_exported_as_it_was_trained(train, tmp_path):
    model = make(tmp_path / "mistral", "mistral")
    types = ["full_attention", "sliding_attention", "full_attention"]
    change_config(model, sliding_window=8, layer_types=types)
    student = train(teacher=model)
    assert_exported(student, model, tmp_path / "reference")
    assert type(AutoModelForCausalLM.from_pretrained(student)).__name__ == "MinistralForCausalLM"


def served_window(student: Path) -> float:
    """Return the window that vLLM derives, by the rule of its ``_get_and_verify_max_len``."""
    config, tokenizer = (
        json.loads((student / name).read_text())
        for name in ("config.json", "tokenizer_config.json")
    )
    window = min(config["max_position_embeddings"], tokenizer.get("model_max_length", 10**30))
    scaling = config["rope_parameters"]
    if scaling["rope_type"] in ("longrope", "llama3"):
        return window
    if scaling["rope_type"] == "yarn":
        window = scaling["original_max_position_embeddings"]
    return window * scaling.get("factor", 1.0)


@pytest.mark.parametrize("limit", [None, M])
@pytest.mark.parametrize("kind", ["abf", "yarn", "llama3", "longrope"])
def test_servers_derive_the_window_that_was_trained(kind, limit, job, train):
    if limit:
        settings = {"eos_token": "</s>", "model_max_length": limit}
        (job / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert served_window(train(f"rope.type={kind}")) == STUDENT


def test_a_linear_student_is_not_cut_at_the_native_window(job, train):
    """A server takes f times the window here; docs/evaluation.md says which option it needs."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    settings |= {"model_max_length": M}
    (job / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    student = train()
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert len(tokenizer("x" * 200, truncation=True)["input_ids"]) == 200
    assert config_of(student)["max_position_embeddings"] == STUDENT


def test_every_length_of_a_config_is_the_student_s(job, train):
    lengths = ("max_sequence_length", "max_length", "n_ctx")
    change_config(job / "model", **dict.fromkeys(lengths, M))
    student = train()
    config = config_of(student)
    assert all(config.get(key, STUDENT) == STUDENT for key in lengths)
    network = AutoModelForCausalLM.from_pretrained(student)
    prompt = torch.randint(256, (1, 100), generator=torch.Generator().manual_seed(0))
    written = network.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2)
    assert written.shape[1] >= 101


def test_code_next_to_a_model_is_neither_run_nor_named(job, train):
    change_config(job / "model", auto_map={"AutoModelForCausalLM": "modeling_custom.Custom"})
    (job / "model" / "modeling_custom.py").write_text("raise SystemExit('run')\n")
    student = train()
    assert "auto_map" not in config_of(student)
    network = AutoModelForCausalLM.from_pretrained(student, trust_remote_code=True)
    assert type(network).__name__ == "LlamaForCausalLM"


def test_files_next_to_the_tokenizer_come_along(job, train):
    model = job / "model"
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (model / "tekken.json").write_text("{}")
    (model / "tokenizer.model.v3").write_text("x")
    student = train()
    names = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tekken.json")
    for name in (*names, "tokenizer.model.v3"):
        assert (student / name).read_bytes() == (model / name).read_bytes()
    templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (model, student)]
    assert templates[0] == templates[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_files_is_kept(dtype, job, train):
    file = job / "model" / "model.safetensors"
    save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, {"format": "pt"})
    change_config(job / "model", dtype=str(dtype).removeprefix("torch."))
    student = train()
    config = config_of(student)
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert {t.dtype for t in load_file(student / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(student, dtype="auto").dtype == dtype


def test_a_window_with_a_scaling_in_the_config_is_their_product(train, tmp_path, capsys):
    """Qwen2.5 and the documentation of transformers keep M and name a factor (issue 38224)."""
    for number, kind in enumerate(("yarn", "linear")):
        model = make(tmp_path / kind, seed=3)
        scaling = {"type": kind, "factor": 4.0}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = M
        rope(model, rope_scaling=scaling)
        student = train(
            f"model.student={model}",
            "rope.type=checkpoint",
            "data.context_length=128",
            "objective.relations={q: 0, k: 0, v: 0}",
            "objective.language_modelling=1",
        )
        config = config_of(student)
        assert config["max_position_embeddings"] == STUDENT, kind
        assert config["rope_parameters"]["factor"] == 4
        assert re.search(rf"^window +{M} -> {STUDENT} ", capsys.readouterr().out, re.MULTILINE)
        assert_exported(student, model, tmp_path / f"reference-{number}")


STUDENTS = {
    "other weights": ({}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "a window of f M": ({}, {"max_position_embeddings": STUDENT}),
    "another theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}),
    "another width of the MLP": ({"intermediate_size": 64}, {}),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_of_its_own_is_exported_with_its_own_weights(name, train, tmp_path):
    made, changes = STUDENTS[name]
    model = make(tmp_path / "student", seed=7, **made)
    change_config(model, **changes)
    theta = config_of(model)["rope_parameters"]["rope_theta"]
    student = train(f"model.student={model}")
    assert_exported(student, model, tmp_path / "reference")
    assert config_of(student)["rope_parameters"] == {
        "rope_type": "linear",
        "rope_theta": theta,
        "factor": 4.0,
    }


REFUSED_STUDENTS = {
    "a smaller vocabulary": ({"vocab_size": 200}, {}, "vocab"),
    "fewer layers": ({"num_hidden_layers": 2}, {}, "layers"),
    "other heads": ({"num_key_value_heads": 4}, {}, "heads"),
    "a larger vocabulary": ({"vocab_size": 259}, {}, "resize_token_embeddings(257)"),
    "scaled already": (
        {},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": STUDENT},
        "rope.type checkpoint",
    ),
}


@pytest.mark.parametrize("name", REFUSED_STUDENTS)
def test_a_student_that_cannot_be_compared_is_refused(name, job, tmp_path, capsys):
    made, changes, part = REFUSED_STUDENTS[name]
    model = make(tmp_path / "student", seed=7, **made)
    if changes:
        rope(model, **changes)
    words = arguments(job, tmp_path / "run", *STILL, f"model.student={model}")
    assert part in refusal(capsys, "train", *words)
    assert not (tmp_path / "run" / "student").exists()


def test_a_tokenizer_that_was_saved_again_is_the_same(job, tmp_path):
    """The same ids with other bytes: a truncation that another trainer left in the file."""
    store = tmp_path / "store"
    assert megalard("prepare", "--model", job / "model", "--output", store, job / "train.txt") == 0
    again = make(tmp_path / "again", seed=2)
    tokenizer = json.loads((again / "tokenizer.json").read_text())
    limit = {"direction": "Right", "max_length": 2048, "strategy": "LongestFirst", "stride": 0}
    (again / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": limit}))
    given = (*STILL, f"data.paths={store}", f"model.teacher={again}")
    assert megalard("train", *arguments(job, tmp_path / "run", *given)) == 0


def test_a_teacher_scaled_by_one_is_native(train, tmp_path):
    model = make(tmp_path / "teacher")
    rope(model, rope_scaling={"type": "linear", "factor": 1.0})
    assert config_of(train(teacher=model))["max_position_embeddings"] == STUDENT


@pytest.mark.parametrize(
    ("scaling", "part"),
    [
        ({"type": "dynamic", "factor": 2.0}, "dynamic"),
        # Beyond the window it depends on the length even so.
        ({"type": "dynamic", "factor": 1.0}, "dynamic"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "rope.type llama3",
        ),
    ],
    ids=["dynamic", "dynamic by one", "llama3"],
)
def test_a_teacher_that_is_scaled_is_refused_with_the_way_out(scaling, part, job, tmp_path, capsys):
    model = make(tmp_path / "teacher")
    rope(model, rope_scaling=scaling)
    words = arguments(job, tmp_path / "run", *STILL, f"model.teacher={model}")
    assert part in refusal(capsys, "train", *words)


def test_a_recipe_s_window_cannot_exceed_the_model_s(job, tmp_path, capsys):
    words = arguments(job, tmp_path / "run", *STILL, "model.native_context=4096")
    line = refusal(capsys, "train", *words)
    assert "4096" in line and str(M) in line
