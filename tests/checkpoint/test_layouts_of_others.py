"""Weight files as public models have them: read as transformers reads them, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import megalard, megalard_on_ranks, user_error
from tests.logits import (
    assert_same_logits,
    decoder_logits,
    load,
    random_tokens,
    relative_error,
    transformers_logits,
)
from tests.models import change_config, make_model

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TOKENS = random_tokens(2, 24)
Tensors = dict[str, torch.Tensor]


def change_tensors(model: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Rewrite the file of a model with what ``change`` makes of its tensors."""
    save_file(change(load_file(model / FILE)), model / FILE, {"format": "pt"})
    return model


def own_head(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return tensors | {"lm_head.weight": torch.randn(67, 32, generator=generator) * 0.2}


def equal_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def make_shards(model: Path, metadata: bool = True) -> Path:
    """Put the tensors of a model into two files with an index."""
    tensors, parts = load_file(model / FILE), {}
    names = sorted(tensors)
    (model / FILE).unlink()
    for number, part in enumerate(PARTS):
        chosen = names[number::2]
        parts |= dict.fromkeys(chosen, part)
        save_file({name: tensors[name] for name in chosen}, model / part, {"format": "pt"})
    index = {"metadata": {}} if metadata else {}
    (model / INDEX).write_text(json.dumps({**index, "weight_map": parts}))
    return model


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model("llama", tmp_path / "model")


@pytest.fixture
def tied(tmp_path) -> Path:
    return make_model("llama-tied", tmp_path / "tied")


def assert_read_alike(model: Path) -> torch.Tensor:
    """Compare our logits with those of transformers; return the latter."""
    expected = transformers_logits(model, TOKENS)
    assert_same_logits(decoder_logits(load(model), TOKENS), expected)
    return expected


def assert_kept_by_conversions(model: Path, expected: torch.Tensor, folder: Path) -> None:
    """Convert there and back; transformers must read the export as the original."""
    assert megalard("convert", "import", model, folder / "sharded") == 0
    assert megalard("convert", "export", folder / "sharded", folder / "export") == 0
    assert relative_error(transformers_logits(folder / "export", TOKENS), expected) == 0


@pytest.mark.parametrize("head", [own_head, equal_head])
def test_a_head_in_the_files_of_a_tied_model(head, tied, tmp_path):
    """transformers keeps a head of its own apart, whatever the flag says."""
    before = transformers_logits(tied, TOKENS)
    expected = assert_read_alike(change_tensors(tied, head))
    assert (relative_error(expected, before) > 0.5) == (head is own_head)
    assert_kept_by_conversions(tied, expected, tmp_path)


def test_a_head_of_its_own_over_two_ranks(tied, tmp_path):
    change_tensors(tied, own_head)
    megalard_on_ranks(2, "convert", "import", tied, tmp_path / "sharded")
    assert megalard("convert", "export", tmp_path / "sharded", tmp_path / "export") == 0
    expected = transformers_logits(tied, TOKENS)
    assert relative_error(transformers_logits(tmp_path / "export", TOKENS), expected) == 0


def test_a_model_that_is_not_tied_needs_a_head(model):
    change_tensors(model, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
    assert "lm_head.weight" in user_error(load, model)


def test_an_index_without_metadata(model):
    expected = transformers_logits(model, TOKENS)
    make_shards(model, metadata=False)
    assert_same_logits(decoder_logits(load(model), TOKENS), expected)


@pytest.mark.parametrize("shards", ["kept", "deleted"])
def test_a_single_file_next_to_an_index_of_old_shards(shards, model, tmp_path):
    """The single file is what was saved last, and what transformers loads."""
    newer = make_model("llama", tmp_path / "newer", seed=1)
    make_shards(model)
    (model / FILE).write_bytes((newer / FILE).read_bytes())
    if shards == "deleted":
        for part in PARTS:
            (model / part).unlink()
    expected = assert_read_alike(model)
    assert relative_error(transformers_logits(newer, TOKENS), expected) == 0
    assert_kept_by_conversions(model, expected, tmp_path)


def test_shards_without_an_index(model):
    expected = transformers_logits(model, TOKENS)
    make_shards(model)
    (model / INDEX).unlink()
    assert_same_logits(decoder_logits(load(model), TOKENS), expected)
    (model / PARTS[1]).unlink()
    assert "has no tensor model.embed_tokens.weight" in user_error(load, model)


def test_an_index_that_names_a_tensor_too_many(model, tmp_path):
    """A name that belongs to no layer and whose file does not hold it costs nothing."""
    make_shards(model)
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.layers.9.self_attn.q_proj.weight"] = PARTS[0]
    (model / INDEX).write_text(json.dumps(index))
    assert_kept_by_conversions(model, assert_read_alike(model), tmp_path)


@pytest.mark.parametrize("kind", ["model", "tied"])
def test_names_without_the_prefix(kind, request, tmp_path):
    """A base model saved alone; with a head, as vllm's issue 19250 has it."""
    folder = request.getfixturevalue(kind)
    change_tensors(folder, lambda t: {n.removeprefix("model."): v for n, v in t.items()})
    assert_kept_by_conversions(folder, assert_read_alike(folder), tmp_path)


def test_a_llama_of_the_first_year(tmp_path):
    """fp16, tables of frequencies in the files, and few keys in config.json."""
    model = make_model("llama-mha", tmp_path / "old")
    frequencies = 1e4 ** -(torch.arange(0, 8, 2) / 8)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    tables = {name.format(layer): frequencies.clone() for layer in range(3)}
    change_tensors(model, lambda t: {n: v.half() for n, v in t.items()} | tables)
    config = json.loads((model / "config.json").read_text())
    new = ("num_key_value_heads", "rope_parameters", "head_dim", "dtype", "mlp_bias")
    new = (*new, "attention_bias", "tie_word_embeddings")
    old = {key: value for key, value in config.items() if key not in new}
    (model / "config.json").write_text(
        json.dumps(old | {"pretraining_tp": 2, "torch_dtype": "float16"})
    )
    assert_kept_by_conversions(model, assert_read_alike(model), tmp_path)


def test_biases_of_q_k_and_v_alone_are_refused(tmp_path):
    model = make_model("llama-biases", tmp_path / "model")
    change_tensors(model, lambda t: {n: v for n, v in t.items() if "o_proj.bias" not in n})
    assert "o_proj.bias" in user_error(load, model)


def test_tensors_of_all_shapes_go_there_and_back(model, tmp_path):
    """Scalars, empty tensors and flags that no decoder reads are kept bit for bit."""
    odd = {
        "model.layers.0.self_attn.k_scale": torch.tensor(1.5),
        "model.empty": torch.zeros(0, 4),
        "model.flag": torch.tensor([True, False]),
        "model.count": torch.tensor(3),
    }
    change_tensors(model, lambda tensors: tensors | odd)
    for ranks in (1, 2):
        megalard_on_ranks(ranks, "convert", "import", model, tmp_path / f"sharded-{ranks}")
        export = tmp_path / f"export-{ranks}"
        assert megalard("convert", "export", tmp_path / f"sharded-{ranks}", export) == 0
        before, after = load_file(model / FILE), load_file(export / FILE)
        assert sorted(before) == sorted(after)
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape
            assert torch.equal(after[name], tensor)


def test_a_classifier_is_refused(model):
    def score(tensors: Tensors) -> Tensors:
        rest = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
        return rest | {"score.weight": torch.zeros(1, 32)}

    change_config(change_tensors(model, score), architectures=["LlamaForSequenceClassification"])
    assert "lm_head.weight" in user_error(load, model)


def test_names_with_a_prefix_of_a_wrapper_are_refused(model):
    change_tensors(model, lambda tensors: {f"module.{n}": t for n, t in tensors.items()})
    assert "model.embed_tokens.weight" in user_error(load, model)


def test_links_into_the_cache_of_the_hub(model, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        blob = tmp_path / "models--a--b" / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert_kept_by_conversions(snapshot, assert_read_alike(snapshot), tmp_path)
    assert "config.json" in user_error(load, tmp_path / "models--a--b")
    assert "meta-llama/Llama-2-7b-hf" in user_error(load, "meta-llama/Llama-2-7b-hf")
