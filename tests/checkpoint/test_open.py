"""Opening a model directory of any kind, and directories that cannot be read as a model."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalard.checkpoint.open import open_model
from megalard.checkpoint.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from megalard.checkpoint.sharded.manifest import MANIFEST
from tests.command_line import megalard, user_error
from tests.conversions import Q_PROJ, lora_pair, make_adapter, shard_models, to_hugging_face
from tests.jobs import save_tokenizer
from tests.models import change_config, make_model
from tests.permissions import give_up_rights
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model with a tokenizer, a narrower and a wider one; the first also as two slices."""
    folder = tmp_path_factory.mktemp("open")
    make_model("llama", folder / "model", vocab_size=257)
    save_tokenizer(folder / "model")
    make_model("llama", folder / "narrower", vocab_size=257, intermediate_size=40)
    make_model("llama", folder / "wider", vocab_size=257, hidden_size=64)
    run_ranks(2, shard_models, str(folder), ("model",), 2)
    return folder


def test_a_hugging_face_directory_and_its_sharded_form_are_the_same_model(models):
    plain, sharded = open_model(models / "model"), open_model(models / "sharded-model")
    assert (plain.kind, sharded.kind) == ("huggingface", "sharded")
    assert plain.spec == sharded.spec and plain.manifest is None
    assert sorted(plain.weights.names()) == sorted(sharded.weights.names())
    for name in plain.weights.names():
        assert torch.equal(plain.weights.read(name), sharded.weights.read(name)), name
    names = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in plain.companions} == names
    assert {path.name for path in sharded.companions} == names
    assert [path.name for path in plain.generation_config] == ["generation_config.json"]
    assert plain.tokenizer.fingerprint == sharded.tokenizer.fingerprint
    # A Hugging Face directory records no checksums.
    assert plain.checked_bytes() == 0
    assert sharded.checked_bytes() > sum(x.nbytes for x in load_file_of(models).values())


def load_file_of(models: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the model."""
    return load_file(models / "model" / "model.safetensors")


def test_an_adapter_is_merged_into_its_base(models, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", models / "model")
    model = open_model(adapter)
    assert model.kind == "adapter" and model.base.directory == models / "model"
    # W + 4 / 2 B A, with A and B of ones and rank 2.
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.weights.read(name), load_file_of(models)[name] + 4.0)
    assert model.trained.names() == [
        f"model.layers.0.self_attn.q_proj.lora_{part}" for part in "AB"
    ]


def test_the_tokenizer_is_the_base_s_where_there_is_none(models, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", models / "model")
    model = open_model(adapter)
    assert not (adapter / "tokenizer.json").exists() and model.finds_tokenizer
    bare = shutil.copytree(models / "narrower", tmp_path / "bare")
    assert not open_model(bare).has_tokenizer and not open_model(bare).finds_tokenizer
    assert "has neither tokenizer.json nor tokenizer.model" in user_error(
        lambda: open_model(bare).tokenizer
    )


def test_a_base_of_another_shape_is_named(models, tmp_path):
    """By the adapter's own matrices, or by the config.json next to it where they would fit."""
    adapter = make_adapter(tmp_path / "adapter", models / "model")
    sentence = user_error(open_model, adapter, models / "wider")
    assert f"but in {models / 'wider'} it has shape" in sentence
    shutil.copy(models / "model" / "config.json", adapter)
    sentence = user_error(open_model, adapter, models / "narrower")
    assert f"mlp.gate_proj.weight in {models / 'narrower'} has shape [40, 32]" in sentence
    assert f"{adapter} is for [48, 32]: give the model it was trained on with --base" in sentence


def test_adapters_are_not_each_other_s_base(models, tmp_path):
    for name, base in (("one", "two"), ("two", "one")):
        make_adapter(tmp_path / name, tmp_path / base)
    sentence = user_error(open_model, tmp_path / "one")
    assert f"the base model of {tmp_path / 'two'} is not at {tmp_path / 'one'}" in sentence


def test_an_adapter_is_not_its_own_base(models, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "adapter")
    assert f"the base model of {adapter} is not at {adapter}" in user_error(open_model, adapter)


@pytest.mark.parametrize("base", [5, [], {"path": "x"}, None, "/nowhere"])
def test_a_base_that_is_not_a_directory_is_refused(base, models, tmp_path):
    config = {"base_model_name_or_path": base}
    adapter = make_adapter(tmp_path / "adapter", models / "model", config)
    assert user_error(open_model, adapter).endswith("give its directory with --base")


def test_a_merge_that_fp16_cannot_hold_is_refused(models, tmp_path):
    source = shutil.copytree(models / "model", tmp_path / "source")
    tensors = {name: value.half() for name, value in load_file_of(models).items()}
    save_file(tensors, source / "model.safetensors")
    adapter = make_adapter(tmp_path / "adapter", source, {"lora_alpha": 1e6})
    sentence = user_error(to_hugging_face, adapter, tmp_path / "out")
    assert "self_attn.q_proj.weight with LoRA merged into it reaches 1e+06" in sentence
    assert "more than float16 holds" in sentence and not (tmp_path / "out").exists()


def test_a_lora_pair_of_a_tensor_that_the_base_lacks_is_refused(models, tmp_path):
    pair = lora_pair("base_model.model.model.layers.7.self_attn.q_proj")
    sentence = user_error(open_model, make_adapter(tmp_path / "a", models / "model", None, pair))
    assert "has model.layers.7.self_attn.q_proj.lora_A, but " in sentence
    assert sentence.endswith("give the model it was trained on with --base")


def test_nothing_that_waits_is_read(models, tmp_path):
    """A named pipe in place of a file is refused at once."""
    adapter = make_adapter(tmp_path / "adapter", models / "model")
    for number, (source, name) in enumerate(
        (
            (models / "model", "config.json"),
            (models / "model", "model.safetensors"),
            (models / "sharded-model", "weights-00000-000.safetensors"),
            (adapter, ADAPTER_WEIGHTS),
        )
    ):
        copy = shutil.copytree(source, tmp_path / str(number))
        (copy / name).unlink()
        os.mkfifo(copy / name)
        sentence = user_error(to_hugging_face, copy, tmp_path / "out")
        # A shard's length differs from the length in the manifest.
        assert str(copy / name) in sentence
        assert "is not a regular file" in sentence or "has 0 bytes" in sentence
    # In place of the file that says what the directory is, there is no such file.
    for number, (source, name) in enumerate(
        ((models / "sharded-model", MANIFEST), (adapter, ADAPTER_CONFIG)), 10
    ):
        copy = shutil.copytree(source, tmp_path / str(number))
        (copy / name).unlink()
        os.mkfifo(copy / name)
        user_error(open_model, copy)


def test_names_and_values_of_files_are_escaped_in_messages(models, tmp_path):
    strange = shutil.copytree(models / "model", tmp_path / "a\x1b[31m\nb")
    change_config(strange, hidden_size="\x1b[2J" + "x" * 10_000)
    sentence = user_error(open_model, strange)
    assert sentence.isprintable() and "a\\x1b[31m\\nb" in sentence and "\\x1b[2J" in sentence
    assert len(sentence) < 500


def test_what_may_not_be_read_is_reported_as_that(models, tmp_path):
    run_ranks(1, _read_without_rights, str(models), str(tmp_path))


def _read_without_rights(models: str, folder: str) -> None:
    """A directory that may not be entered or listed, and a file that may not be read."""
    give_up_rights()
    adapter = make_adapter(Path(folder) / "an-adapter", Path(models) / "model")
    for number, (source, name) in enumerate(
        (
            (f"{models}/model", ""),
            (f"{models}/model", "config.json"),
            (f"{models}/model", "model.safetensors"),
            (f"{models}/sharded-model", ""),
            (f"{models}/sharded-model", MANIFEST),
            (f"{models}/sharded-model", "weights-00001-000.safetensors"),
            (adapter, ""),
            (adapter, ADAPTER_CONFIG),
            (adapter, ADAPTER_WEIGHTS),
        )
    ):
        copy = shutil.copytree(source, f"{folder}/{number}")
        victim = Path(copy, name)
        mode = victim.stat().st_mode
        victim.chmod(0)
        exported = user_error(to_hugging_face, copy, f"{folder}/out")
        for sentence in (exported, _inspected(copy)):
            assert "Permission denied" in sentence and str(copy) in sentence, (source, name)
            assert "damaged" not in sentence and "again" not in sentence, sentence
        victim.chmod(mode)
    # A base whose parent directory may not be entered.
    base = Path(shutil.copytree(f"{models}/model", f"{folder}/closed/base"))
    adapter = make_adapter(Path(folder) / "another-adapter", base)
    base.parent.chmod(0)
    assert f"cannot read {base}: Permission denied" in user_error(open_model, adapter)
    base.parent.chmod(0o755)


def _inspected(source: str) -> str:
    with redirect_stdout(StringIO()) as printed:
        assert megalard("inspect", source) == 1
    return printed.getvalue()


def test_the_base_of_a_moved_adapter_can_be_given(models, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", Path("/nowhere"))
    assert open_model(adapter, models / "model").base.directory == models / "model"
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == "/nowhere"
    assert f"{Q_PROJ}.lora_A.weight" in load_file(adapter / ADAPTER_WEIGHTS)
