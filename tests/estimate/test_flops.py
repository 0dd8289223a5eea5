"""The operations of a step against torch's counter of operations, and against the formula 6 N T."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megalard.estimate.flops import flops_by_kind, step_flops, stream_flops
from megalard.estimate.gpus import peak_flops
from megalard.model.spec import read_spec
from tests.config.loading import load
from tests.models import make_model

TOKENS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that is wide compared with its heads, as large models are."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    return make_model("llama", tmp_path_factory.mktemp("flops") / "model", **shape)


def products(counter: FlopCounterMode) -> int:
    """Return the operations of products with weights alone, without attention."""
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def flops(model, *overrides: str) -> float:
    """Return the operations of one block of the only stream."""
    config = load(f"--data.context_length={TOKENS}", *overrides)
    (stream,) = config.all_streams().values()
    return stream_flops(stream, config.trainable, read_spec(model))


LANGUAGE_MODELLING = ("--trainable.mode=all", "--streams={a: {objective: {language_modelling: 1}}}")


def test_training_all_weights_is_six_operations_per_weight_and_token(model):
    """Kaplan et al., arXiv 2001.08361: 2 N forward and 4 N backward, and attention."""
    weights = sum(
        parameter.numel()
        for name, parameter in AutoModelForCausalLM.from_pretrained(model).named_parameters()
        if parameter.dim() == 2 and "embed" not in name
    )
    # Forward 4 operations per pair of tokens and feature, of half of the pairs; 2.5 times that
    # backward, where the scores are computed again.
    attention = 3 * 128 * 4 * (TOKENS**2 / 2) * 3.5
    assert flops(model, *LANGUAGE_MODELLING) == 6 * weights * TOKENS + attention


def test_training_all_weights_is_what_torch_counts(model):
    decoder = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.randint(67, (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        decoder(ids, labels=ids).loss.backward()
    attention = 3 * 128 * 4 * (TOKENS**2 / 2) * 3.5
    ours = flops(model, *LANGUAGE_MODELLING) - attention
    # The input of the first layer has a gradient here, because the embedding is trained.
    assert ours == pytest.approx(products(counter), rel=0.02)


def test_training_some_weights_is_what_torch_counts(model):
    """A frozen weight needs no gradient, and the input of the first layer needs none either."""
    decoder = AutoModelForCausalLM.from_pretrained(model)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad = "q_proj" in name
    ids = torch.randint(67, (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        decoder(ids, labels=ids).loss.backward()
    attention = 3 * 128 * 4 * (TOKENS**2 / 2) * 3.5
    options = ("--trainable.mode=weights", "--trainable.weights=[q]", LANGUAGE_MODELLING[1])
    ours = flops(model, *options) - attention
    assert ours == pytest.approx(products(counter), rel=0.02)


def test_relations_are_counted_by_hand(model):
    """Two layers of which the second only gives q and k, LoRA of rank 8 on q; teacher and student.

    Sizes: hidden 128, q 128, k and v 64 each (two heads of 32), MLP 256.
    """
    qkv, rest = 128 * (128 + 64 + 64), 128 * 128 + 3 * 128 * 256
    weights = 2 * qkv + 1 * rest  # of the second layer q, k and v alone
    pairs = TOKENS**2 / 2
    attention = 4 * pairs * 128
    lora = 6 * 8 * (128 + 128) * 2 * TOKENS
    # Q/K has four heads and V/V two heads of 32 features; two products forward and four backward.
    relations = 12 * pairs * 32 * (4 + 2) * 2
    expected = 2 * (2 * TOKENS * weights + attention)
    expected += 2 * TOKENS * (weights - qkv) + 2.5 * attention
    options = ("--objective.layers=[0, 1]", "--objective.relations={q: 0, k: 0, qk: 1}")
    lora_options = ("--trainable.lora={targets: [q], rank: 8}",)
    assert flops(model, *options, *lora_options) == expected + lora + relations


def test_the_products_of_the_forward_passes_are_counted_by_hand(model):
    """Two operations per token, model and weight; LoRA has a third of its products there."""
    weights = 3 * (128 * (128 + 64 + 64) + 128 * 128 + 3 * 128 * 256) + 67 * 128
    head = "--objective={relations: {q: 0, k: 0, v: 0}, logits_kl: 1}"
    lora = "--trainable.lora={targets: [q], rank: 8}"
    pairs = 2 * 8 * (128 + 128) * 3
    for options, expected in (
        (LANGUAGE_MODELLING, 2 * weights),
        ((head, "--trainable.mode=all"), 2 * 2 * weights),
        ((head, "--trainable.mode=weights", "--trainable.weights=[q]"), 2 * 2 * weights),
        ((head, lora), 2 * 2 * weights + pairs),
    ):
        config = load(f"--data.context_length={TOKENS}", *options)
        (stream,) = config.all_streams().values()
        counted = flops_by_kind(stream, config.trainable, read_spec(model))
        assert counted.products_forward == expected * TOKENS


def test_a_step_is_all_blocks_of_all_streams(model):
    terms = "objective: {logits_kl: 1}, data: {context_length: 32}"
    config = load(f"--streams={{a: {{{terms}, global_batch: 3}}, b: {{{terms}, global_batch: 5}}}}")
    spec = read_spec(model)
    (stream, _) = config.all_streams().values()
    assert step_flops(config, spec) == 8 * stream_flops(stream, config.trainable, spec)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Some other card", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(name, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == expected
    assert peak_flops(torch.device("cpu")) is None
