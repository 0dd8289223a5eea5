"""Gradients on the way: the buckets of the trainer, and the bytes at places of a step, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalard.config.schema import ParallelConfig
from megalard.estimate import buckets as estimated
from megalard.estimate.buckets import Buckets
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.trained import Trained, TrainedTensor
from megalard.estimate.weights import trained_of
from megalard.parallel.mesh import Axis
from megalard.training.masters import sharded
from tools.bench.random_model import random_spec
from tools.bench.random_run import make_config

LAYER = "model.layers.0.mlp."
HEAD, DOWN = "lm_head.weight", f"{LAYER}down_proj.weight"


def made(
    monkeypatch, holders: int = 2, is_repeated: bool = False, has_rows: bool = False, **parallel
) -> Buckets:
    """Return three buckets: the head of 12 elements, two weights of 5 and 6, and one of 10."""
    monkeypatch.setattr(estimated, "BUCKET_ELEMENTS", 10)
    tensors = {
        "model.embed_tokens.weight": TrainedTensor((5, 2), holders, True),
        f"{LAYER}gate_proj.weight": TrainedTensor((3, 2), holders, True, has_rows),
        f"{LAYER}down_proj.weight": TrainedTensor((5, 1), holders, True, has_rows),
        "lm_head.weight": TrainedTensor((12, 1), holders, True),
    }
    return Buckets(Trained(tensors, 0), ParallelConfig(**parallel), 2, is_repeated)


def meta(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"))


@pytest.mark.parametrize("mode", ["lora", "all"])
@pytest.mark.parametrize("layout", [RankLayout(dp=4), RankLayout(dp=2, tp=16)], ids=str)
def test_buckets_are_those_of_the_trainer(mode, layout):
    assert estimated.BUCKET_ELEMENTS == sharded.BUCKET_ELEMENTS
    config = make_config({"trainable.mode": mode, "trainable.lora.rank": 1024})
    trained = trained_of(config, random_spec("llama3-8b", 4096), layout)
    parameters = {meta(x.shape): name for name, x in trained.divided.items()}
    pairs = [(p, Axis(None, 0, trained.tensors[name].holders)) for p, name in parameters.items()]
    expected = [
        ({parameters[p] for p in filled}, axis.size)
        for filled, axis in sharded._fill_buckets(pairs)
    ]
    buckets = Buckets(trained, config.parallel, 2, is_repeated=False).buckets
    assert [(set(bucket.names), bucket.holders) for bucket in buckets] == expected


def test_a_gradient_waits_in_bf16_until_its_bucket_is_packed(monkeypatch):
    buckets = made(monkeypatch)
    assert [bucket.elements for bucket in buckets.buckets] == [12, 11, 10]
    assert buckets.waiting() == 0
    # The head is its own bucket: 12 gradients in bf16, and packed in fp32.
    assert buckets.packing((), HEAD) == 2 * 12 + 4 * 12
    # What is sent, and half of it as the sum. Five gradients wait for the other six.
    assert buckets.waiting([HEAD]) == 4 * (12 + 6)
    assert buckets.waiting([HEAD, DOWN]) == 4 * (12 + 6) + 2 * 5
    # Five rows on two ranks are packed as six.
    packing = buckets.packing([HEAD, DOWN], f"{LAYER}gate_proj.weight")
    assert packing == 4 * (12 + 6) + 2 * 11 + 4 * (6 + 8)


def test_at_most_two_buckets_are_on_the_way(monkeypatch):
    buckets = made(monkeypatch)
    both = [HEAD, DOWN, f"{LAYER}gate_proj.weight"]
    assert buckets.waiting(both) == 4 * (12 + 6) + 4 * (14 + 7)
    everything = [*both, "model.embed_tokens.weight"]
    # The embedding's five rows are packed as six rows of two.
    assert buckets.waiting(everything) == 4 * (14 + 7) + 4 * (12 + 6)


def test_the_last_gradients_are_on_the_way_as_the_next_micro_batch_begins(monkeypatch):
    buckets = made(monkeypatch, is_repeated=True)
    assert buckets.waiting() == 4 * (14 + 7) + 4 * (12 + 6)
    assert buckets.packing((), HEAD) == 4 * (12 + 6) + 2 * 12 + 4 * 12
    assert buckets.waiting([HEAD]) == 4 * (12 + 6) + 4 * (12 + 6)


def test_one_rank_alone_sends_nothing(monkeypatch):
    buckets = made(monkeypatch, holders=1, offload_optimizer=True)
    assert buckets.waiting([HEAD]) == 0
    assert buckets.packing((), HEAD) == 2 * 12 + 4 * 12


def test_gradients_in_bf16_are_sent_in_bf16_and_copied_for_the_update(monkeypatch):
    buckets = made(monkeypatch, gradient_dtype="bfloat16")
    assert buckets.waiting([HEAD]) == 2 * (12 + 6)
    assert buckets.updated() == 4 * (6 + 7 + 6)
    assert made(monkeypatch).updated() == 0
    offloaded = made(monkeypatch, gradient_dtype="bfloat16", offload_optimizer=True)
    assert offloaded.updated() == 4 * 7, "one bucket after the other"


def test_two_buckets_of_weights_are_gathered_at_once(monkeypatch):
    """Rounded in bf16, and gathered from two ranks; from the host they come in fp32 first."""
    assert made(monkeypatch).published() == 2 * (6 + 7) + 2 * (12 + 14)
    offloaded = made(monkeypatch, holders=1, offload_optimizer=True).published()
    assert offloaded == 2 * (11 + 12) + 4 * 12


def test_weights_that_are_gathered_by_layer_are_not_gathered_after_the_update(monkeypatch):
    assert made(monkeypatch, has_rows=True).published() == 2 * 6 + 2 * 12
