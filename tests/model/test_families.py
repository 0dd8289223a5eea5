"""The decoder against transformers: every family and flag, native and scaled, whole and spread."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megalard.config.schema import RopeConfig
from megalard.model.rope import scaled_config
from megalard.model.spec import SUPPORTED, read_spec, spec_from_config
from megalard.parallel.mesh import build_mesh
from tests.logits import (
    assert_same_logits,
    decoder_logits,
    load,
    random_tokens,
    transformers_logits,
)
from tests.models import FAMILIES, copy_with_config, make_model
from tests.ranks import run_ranks

NATIVE = 64
ROPES = ("linear", "abf", "yarn", "llama3", "longrope", "table")
SMALL_VOCAB = "vocabulary-of-5"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory of every family, and one whose vocabulary leaves the last of four ranks none."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_model(family, folder / family)
    make_model("llama-tied", folder / SMALL_VOCAB, vocab_size=5)
    return folder


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(family, length, models):
    tokens = random_tokens(2, length)
    ours = decoder_logits(load(models / family), tokens)
    assert_same_logits(ours, transformers_logits(models / family, tokens))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scaled_logits_match_transformers_within_and_beyond_the_native_window(
    family, rope, models, tmp_path
):
    spec = read_spec(models / family)
    table = tmp_path / "table.json"
    table.write_text(json.dumps([0.9 ** (i * i) for i in range(spec.head_dim // 2)]))
    settings = RopeConfig(rope, 4.0, table=str(table) if rope == "table" else None)
    config = scaled_config(spec, settings, NATIVE)
    scaled = copy_with_config(models / family, tmp_path / "scaled", config)
    decoder = load(scaled)
    for length in (21, NATIVE + 27):
        tokens = random_tokens(1, length)
        expected = transformers_logits(scaled, tokens)
        assert_same_logits(decoder_logits(decoder, tokens), expected)
    native = transformers_logits(models / family, tokens)
    assert (native - expected).norm() > 0.01 * native.norm(), "scaling changed nothing"


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_indexed_shards_give_the_same_logits(family, models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models / family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = random_tokens(2, 17)
    single = decoder_logits(load(models / family), tokens)
    assert torch.equal(decoder_logits(load(tmp_path), tokens), single)


def _tensor_parallel_logits(folder: str, names: list[str], results: str) -> None:
    found = {}
    for tp in (2, 4):
        mesh = build_mesh("cpu", tp)
        for name in names:
            decoder = load(f"{folder}/{name}", mesh.tp)
            tokens = random_tokens(4, 9, decoder.spec.vocab_size)
            found[tp, name] = decoder_logits(decoder, tokens)
            rows = decoder.layouts["model.embed_tokens.weight"].length
            if name == SMALL_VOCAB and mesh.world.rank == 3:
                assert rows == (0 if tp == 4 else 2)
    if mesh.world.rank == 0:
        torch.save(found, results)


def test_logits_do_not_depend_on_tp(models, tmp_path):
    """tp 2 and 4, with a vocabulary that they don't divide, and one with a rank without rows."""
    names = [*FAMILIES, SMALL_VOCAB]
    run_ranks(4, _tensor_parallel_logits, str(models), names, str(tmp_path / "logits.pt"))
    for (_, name), logits in torch.load(tmp_path / "logits.pt").items():
        tokens = random_tokens(4, 9, logits.shape[-1])
        assert_same_logits(logits, transformers_logits(models / name, tokens))


@pytest.mark.parametrize("family", SUPPORTED)
def test_what_a_config_leaves_out_is_what_transformers_takes(family):
    silent = {
        "model_type": family,
        "vocab_size": 67,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "max_position_embeddings": 64,
    }
    theirs = CONFIG_MAPPING[family](**silent)
    ours = spec_from_config(silent, "here")
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 30
    window = getattr(theirs, "sliding_window", None)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rope == theirs.rope_parameters
    assert ours.windows == tuple(window if k == "sliding_attention" else None for k in kinds)
    if family.startswith("qwen"):
        windowed = {**silent, "use_sliding_window": True}
        kinds = CONFIG_MAPPING[family](**windowed).layer_types
        expected = tuple(4096 if k == "sliding_attention" else None for k in kinds)
        assert spec_from_config(windowed, "here").windows == expected
