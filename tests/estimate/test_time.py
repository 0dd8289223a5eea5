"""Time of a step: what each setting and each axis adds or takes away."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megalard.estimate.flops import flops_by_kind, stream_flops
from megalard.estimate.gpus import Machines, parse_gpus
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.time import (
    ATTENTION,
    EXCHANGE,
    OFFLOAD,
    POINTWISE,
    PRODUCTS,
    RELATIONS_KIND,
    UPDATE,
    step_time,
)
from tools.bench.random_model import random_spec
from tools.bench.random_run import make_config

SPEC = random_spec("llama2-7b", 32768)


ELEMENTS = 805_306_368  # LoRA of rank 1024 on q, k and v of 32 layers


def times(
    layout: RankLayout, nodes: int = 1, network: float = 50e9, host: float | None = None, **settings
) -> dict[str, float]:
    """Return the seconds by kind on H100s, whose copies to the host may have another rate."""
    count, gpu = parse_gpus("8 x H100", None, None)
    gpu = replace(gpu, host=host or gpu.host)
    given = {"data.context_length": 32768, "trainable.lora.dropout": 0}
    given |= {key.replace("__", "."): value for key, value in settings.items()}
    return step_time(make_config(given), SPEC, layout, Machines(gpu, count, nodes, network))


def test_the_kinds_of_operations_are_all_of_them():
    config = make_config({"data.context_length": 32768})
    (stream,) = config.all_streams().values()
    flops = flops_by_kind(stream, config.trainable, SPEC)
    assert flops.total == stream_flops(stream, config.trainable, SPEC)
    # Causal pairs times heads times head_dim: 2 products forward and 4 backward, of 2 operations.
    pairs = 32768**2 / 2 * 32 * 128
    assert flops.relation_forward == 3 * 32 * 2 * 2 * pairs
    assert flops.relation_backward == 2 * flops.relation_forward
    assert flops.attention_forward == 2 * 31 * 4 * pairs


def test_attention_over_two_nodes_waits_for_k_and_v_that_its_products_do_not_hide():
    """One block without relations; LoRA of rank 1 has hardly any gradients to sum."""
    given = {f"objective__relations__{name}": 0 for name in "qkv"} | {"objective__logits_kl": 1}
    given |= {"optimizer__global_batch": 1, "trainable__lora__rank": 1}
    layout = RankLayout(cp=16)
    slow, fast = (times(layout, 2, network, **given)[EXCHANGE] for network in (1e9, 1e15))
    # Of each of 32 layers, K and V of 15 other ranks: bf16, 4096 features of 2048 tokens. Teacher
    # and student gather them, the student again, and the backward pass scatters the gradients.
    sent = 32 * 4 * 2 * 15 * 2048 * 4096 * 2
    assert slow - fast == pytest.approx(sent / 1e9, rel=0.03)


@pytest.mark.parametrize("axis", ["dp", "cp", "tp"])
def test_two_ranks_halve_products_and_relations(axis):
    one, two = times(RankLayout()), times(RankLayout(**{axis: 2}))
    assert two[PRODUCTS] == pytest.approx(one[PRODUCTS] / 2)
    assert two[RELATIONS_KIND] == pytest.approx(one[RELATIONS_KIND] / 2, rel=0.08)
    assert two[EXCHANGE] > 0 == one[EXCHANGE]
    # Over dp and cp the state is divided. Over tp B is cut, and A divided.
    assert two[UPDATE] == pytest.approx(one[UPDATE] / 2, rel=0.1)


def test_layers_that_are_computed_again_take_time():
    layout = RankLayout()
    again, once = times(layout), times(layout, parallel__activation_checkpointing=False)
    # Of the products, the student's forward pass once more, without the last projection.
    assert 1.2 < again[PRODUCTS] / once[PRODUCTS] < 1.35
    assert again[ATTENTION] > once[ATTENTION] and again[POINTWISE] > once[POINTWISE]
    assert again[RELATIONS_KIND] == once[RELATIONS_KIND]


def test_offloading_takes_the_time_that_its_copies_take_longer_than_the_rest():
    assert times(RankLayout(), parallel__offload=True)[OFFLOAD] == 0
    # 31 inputs and 96 gradients of 4096 bf16 features per token, in 8 micro-batches, at 1 GB/s.
    copies = 2 * 8 * 32768 * (31 + 96) * 4096 * 2 / 1e9
    seconds = times(RankLayout(), host=1e9, parallel__offload=True)
    rest = sum(seconds[kind] for kind in seconds if kind not in (OFFLOAD, UPDATE))
    assert seconds[OFFLOAD] == pytest.approx(copies - rest)
    assert times(RankLayout(), host=1e9)[OFFLOAD] == 0


def test_whole_gradients_cross_nodes_at_the_rate_of_the_network():
    whole = {"parallel__shard_optimizer": False}
    inside, across = times(RankLayout(dp=8), **whole), times(RankLayout(dp=16), nodes=2, **whole)
    assert inside[EXCHANGE] == pytest.approx(2 * 7 / 8 * ELEMENTS * 4 / 240e9)
    assert across[EXCHANGE] == pytest.approx(2 * 15 / 16 * ELEMENTS * 4 / 50e9)
    assert inside[UPDATE] == times(RankLayout())[UPDATE]


def test_of_divided_state_the_gathering_of_weights_is_not_hidden():
    """The sums of gradients overlap the backward pass, which takes longer."""
    inside, across = times(RankLayout(dp=8)), times(RankLayout(dp=16), nodes=2)
    assert inside[EXCHANGE] == pytest.approx(7 / 8 * ELEMENTS * 2 / 240e9)
    assert across[EXCHANGE] == pytest.approx(15 / 16 * ELEMENTS * 2 / 50e9)


@pytest.mark.parametrize(("dtype", "bytes_"), [("float32", 4), ("bfloat16", 2)])
def test_sums_that_take_longer_than_the_backward_pass_are_not_hidden(dtype, bytes_):
    """Each of two micro-batches adds what a slower network takes longer."""
    settings = {"parallel__gradient_dtype": dtype, "optimizer__global_batch": 32}
    slow, slower = (
        times(RankLayout(dp=16), nodes=2, network=network, **settings) for network in (1e8, 5e7)
    )
    sent = 15 / 16 * ELEMENTS * (2 * bytes_ + 2)
    assert slower[EXCHANGE] - slow[EXCHANGE] == pytest.approx(sent * (1 / 5e7 - 1 / 1e8))
    assert slow[EXCHANGE] < sent / 1e8, "the backward pass hides a part"


def test_offloaded_state_is_updated_at_the_rate_of_the_host():
    """AdamW moves 28 bytes per element; gradients and masters cross in fp32."""
    seconds = times(RankLayout(dp=8), parallel__offload_optimizer=True)
    assert seconds[UPDATE] == pytest.approx(ELEMENTS / 8 * 28 / 98e9)
    assert seconds[OFFLOAD] == pytest.approx(2 * ELEMENTS / 8 * 4 / 60e9)


def test_the_time_of_products_does_not_depend_on_the_micro_batch():
    """Eight blocks take as long in two micro-batches of four as in eight of one."""
    layout = RankLayout(1, 1, 1)
    one, four = (
        times(layout, optimizer__global_batch=8, optimizer__micro_batch=size) for size in (1, 4)
    )
    assert one[PRODUCTS] == pytest.approx(four[PRODUCTS])
