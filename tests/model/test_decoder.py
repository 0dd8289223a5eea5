"""The decoder against transformers: every family and flag, native and scaled, on 1 to 4 ranks."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from megalard.config.schema import RopeConfig
from megalard.model.rope import scaled_config
from megalard.model.spec import read_spec
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
    """A model of every family, and one with too few vocabulary entries for four ranks."""
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
    logits = {}
    for tp in (2, 4):
        mesh = build_mesh("cpu", tp)
        for name in names:
            decoder = load(f"{folder}/{name}", mesh.tp)
            tokens = random_tokens(4, 9, decoder.spec.vocab_size)
            logits[tp, name] = decoder_logits(decoder, tokens)
            rows = decoder.slices["model.embed_tokens.weight"].length
            if name == SMALL_VOCAB and mesh.world.rank == 3:
                assert rows == (0 if tp == 4 else 2)
    if mesh.world.rank == 0:
        torch.save(logits, results)


def test_logits_do_not_depend_on_tp(models, tmp_path):
    """With tp 2 and 4, whose ranks do not divide the vocabularies; one rank has no rows."""
    names = [*FAMILIES, SMALL_VOCAB]
    run_ranks(4, _tensor_parallel_logits, str(models), names, str(tmp_path / "logits.pt"))
    results = torch.load(tmp_path / "logits.pt")
    assert results.keys() == {(tp, name) for tp in (2, 4) for name in names}
    for (_, name), logits in results.items():
        tokens = random_tokens(4, 9, logits.shape[-1])
        assert_same_logits(logits, transformers_logits(models / name, tokens))
