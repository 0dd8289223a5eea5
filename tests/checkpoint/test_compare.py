"""Comparing two models: every difference of tensors, and their logits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalard.checkpoint import compare
from megalard.checkpoint.compare import (
    logits_difference,
    logits_of,
    read_tokens,
    tensor_differences,
)
from megalard.checkpoint.open import open_model
from tests.command_line import user_error
from tests.jobs import save_tokenizer
from tests.logits import assert_same_logits, transformers_logits
from tests.models import make_model

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a byte-level tokenizer, and another with the same shape."""
    folder = tmp_path_factory.mktemp("compare")
    for name, seed in (("a", 0), ("b", 1)):
        make_model("llama", folder / name, seed=seed, vocab_size=257)
        save_tokenizer(folder / name)
    (folder / "text.txt").write_text("the mask of the rope " * 3)
    return folder


def changed(folder, target, change) -> None:
    """Copy a model with changed tensors."""
    shutil.copytree(folder / "a", target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def test_every_kind_of_difference_is_named(folder, tmp_path):
    def change(tensors):
        tensors[UP_PROJ].view(torch.int32)[3, 5] ^= 1
        q_proj = "model.layers.0.self_attn.q_proj.weight"
        tensors[q_proj] = tensors[q_proj].bfloat16()
        norm = tensors.pop("model.norm.weight")
        tensors["extra"] = torch.zeros(2)
        tensors["model.layers.0.input_layernorm.weight"] = norm[:16].clone()

    changed(folder, tmp_path / "b", change)
    # Opened as tensors only: its config does not fit them any more.
    lines = tensor_differences(open_model(folder / "a"), open_model(tmp_path / "b"))
    starts = [
        f"model.norm.weight: only in {folder / 'a'}",
        f"extra: only in {tmp_path / 'b'}",
        "model.layers.0.input_layernorm.weight: shape [32] and [16]",
        "model.layers.0.self_attn.q_proj.weight: dtype float32 and bfloat16",
        f"{UP_PROJ}: 1 of 1536 elements differ, the first at [3, 5] (",
    ]
    assert len(lines) == 5
    assert all(any(line.startswith(start) for line in lines) for start in starts)


def test_the_first_difference_is_found_in_any_block(folder, tmp_path, monkeypatch):
    """Tensors are compared in blocks, and the largest difference may follow in a later block."""

    def change(tensors):
        weight = tensors[UP_PROJ]
        weight[1, 3], weight[2, 0] = weight[1, 3] + 1.0, weight[2, 0] + 4.0

    changed(folder, tmp_path / "b", change)
    monkeypatch.setattr(compare, "BLOCK_ELEMENTS", 10)
    models = open_model(folder / "a"), open_model(tmp_path / "b")
    (line,) = tensor_differences(*models)
    value = models[0].weights.read(UP_PROJ)[1, 3]
    assert line == (
        f"{UP_PROJ}: 2 of 1536 elements differ, the first at [1, 3] ({float(value)!r} and "
        f"{float(value + 1.0)!r}), at most by 4"
    )


def test_bits_are_compared_and_not_values(folder, tmp_path):
    """-0.0 equals 0.0, and a NaN with the same bits is the same."""

    def make_zero_and_nan(tensors, sign):
        tensors["model.norm.weight"][0] = sign * 0.0
        tensors["model.norm.weight"][1] = float("nan")

    changed(folder, tmp_path / "a", lambda tensors: make_zero_and_nan(tensors, 1))
    changed(folder, tmp_path / "b", lambda tensors: make_zero_and_nan(tensors, -1))
    models = [open_model(tmp_path / name) for name in ("a", "b")]
    assert tensor_differences(models[0], models[0]) == []
    assert tensor_differences(*models) == [
        "model.norm.weight: 1 of 32 elements differ, the first at [0] (0.0 and -0.0), at most by 0"
    ]


def test_progress_counts_the_bytes_of_the_first_model(folder):
    counts: list[int] = []
    tensor_differences(open_model(folder / "a"), open_model(folder / "b"), counts.append)
    size = sum(x.nbytes for x in load_file(folder / "a" / "model.safetensors").values())
    assert sum(counts) == size


def test_logits_are_those_of_transformers(folder):
    tokens = torch.arange(40) * 3 % 257
    logits = logits_of(open_model(folder / "a"), tokens, torch.float32)
    assert_same_logits(logits[None], transformers_logits(folder / "a", tokens[None]))


def test_the_difference_of_logits_is_that_of_their_formulas(folder):
    tokens = torch.arange(40) * 3 % 257
    models = [open_model(folder / name) for name in ("a", "b")]
    x, y = (transformers_logits(folder / name, tokens[None])[0] for name in ("a", "b"))
    difference = logits_difference(*models, tokens)
    assert difference.tokens == 40
    assert difference.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-4)
    assert difference.largest == pytest.approx(float((x - y).abs().max()), rel=1e-4)
    kl = torch.nn.functional.kl_div(
        y.log_softmax(-1), x.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert difference.kl == pytest.approx(float(kl), rel=1e-4)
    same = (x.argmax(-1) == y.argmax(-1)).double().mean()
    assert difference.agreement == pytest.approx(float(same))
    equal = logits_difference(models[0], models[0], tokens)
    assert (equal.relative, equal.largest, equal.kl, equal.agreement) == (0, 0, 0, 1)


def test_the_text_is_read_with_the_first_tokenizer(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder / "a", bare)
    (bare / "tokenizer.json").unlink()
    models = [open_model(bare), open_model(folder / "b")]
    tokens = read_tokens(models, folder / "text.txt", 10)
    # One id per letter: "the mask of".
    vocabulary = json.loads((folder / "b" / "tokenizer.json").read_text())["model"]["vocab"]
    assert tokens.tolist() == [vocabulary["Ġ" if c == " " else c] for c in "the mask o"]


def test_logits_that_cannot_be_compared_are_refused(folder, tmp_path):
    model = open_model(folder / "a")
    wider = open_model(make_model("llama", tmp_path / "wider", vocab_size=300))
    narrow = make_model("llama", tmp_path / "narrow", vocab_size=100)
    save_tokenizer(narrow)
    text, empty = folder / "text.txt", tmp_path / "short.txt"
    empty.write_text("a")
    for models, file, count, sentence in (
        ([model, wider], text, 9, f"{tmp_path / 'wider'} has 300 entries): compare the tensors"),
        ([model, model], text, 0, "0 tokens are too few to compare logits on: give 1 or more"),
        ([model, model], text, -3, "-3 tokens are too few to compare logits on"),
        ([model, model], empty, 9, f"{empty} has 1 tokens: give a longer text"),
        ([open_model(narrow)] * 2, text, 9, "but the models have 100 entries: give another text"),
        ([wider, wider], text, 9, "has neither tokenizer.json nor tokenizer.model"),
    ):
        assert sentence in user_error(read_tokens, models, file, count)
