"""The slices of ranks, against slices that are written out by hand."""

from __future__ import annotations

import pytest
import torch

from megalard.model.parameter_slice import ParameterSlice, full_slice
from megalard.model.spec import ModelSpec, spec_from_config
from megalard.parallel.tensor.slices import check_divisible, kv_replicas, slice_of_parameter
from tests.command_line import user_error


def spec(
    heads: int = 4, kv_heads: int = 2, intermediate: int = 48, family: str = "llama"
) -> ModelSpec:
    """Return the spec of a small model."""
    config = {
        "model_type": family,
        "vocab_size": 67,
        "hidden_size": 8 * heads,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
    }
    return spec_from_config(config, "here")


# For four ranks: the name and the full shape, then dim, (start, length) of each rank, and replicas.
EVERYWHERE = (None, [(0, 0)] * 4, 4)
SLICES = {
    "self_attn.q_proj.weight": ((32, 32), (0, [(0, 8), (8, 8), (16, 8), (24, 8)], 1)),
    "self_attn.q_proj.bias": ((32,), (0, [(0, 8), (8, 8), (16, 8), (24, 8)], 1)),
    # Two K/V heads: two ranks hold each of them.
    "self_attn.k_proj.weight": ((16, 32), (0, [(0, 8), (0, 8), (8, 8), (8, 8)], 2)),
    "self_attn.v_proj.lora_B": ((16, 6), (0, [(0, 8), (0, 8), (8, 8), (8, 8)], 2)),
    "self_attn.q_proj.lora_A": ((6, 32), EVERYWHERE),
    "self_attn.o_proj.weight": ((32, 32), (1, [(0, 8), (8, 8), (16, 8), (24, 8)], 1)),
    "self_attn.o_proj.lora_A": ((6, 32), (1, [(0, 8), (8, 8), (16, 8), (24, 8)], 1)),
    "self_attn.o_proj.lora_B": ((32, 6), EVERYWHERE),
    "self_attn.o_proj.bias": ((32,), EVERYWHERE),
    "mlp.up_proj.weight": ((48, 32), (0, [(0, 12), (12, 12), (24, 12), (36, 12)], 1)),
    "mlp.down_proj.weight": ((32, 48), (1, [(0, 12), (12, 12), (24, 12), (36, 12)], 1)),
    "input_layernorm.weight": ((32,), EVERYWHERE),
}
# The norm of heads has one weight for all of them; the norm of full width has one per feature.
HEAD_NORM = ("qwen3", (8,), EVERYWHERE)
Q_NORM = ("olmo2", (32,), (0, [(0, 8), (8, 8), (16, 8), (24, 8)], 1))
K_NORM = ("olmo2", (16,), (0, [(0, 8), (0, 8), (8, 8), (8, 8)], 2))


@pytest.mark.parametrize("name", SLICES)
def test_a_rank_holds_its_slice(name):
    shape, (dim, slices, replicas) = SLICES[name]
    for rank, (start, length) in enumerate(slices):
        held = slice_of_parameter(f"model.layers.1.{name}", shape, spec(), rank, 4)
        assert held == ParameterSlice(shape, dim, start, length, replicas)


@pytest.mark.parametrize(
    ("name", "case"),
    [("q_norm", HEAD_NORM), ("k_norm", HEAD_NORM), ("q_norm", Q_NORM), ("k_norm", K_NORM)],
)
def test_norms_of_queries_and_keys_are_split_if_they_span_all_heads(name, case):
    family, shape, (dim, slices, replicas) = case
    for rank, (start, length) in enumerate(slices):
        full_name = f"model.layers.1.self_attn.{name}.weight"
        held = slice_of_parameter(full_name, shape, spec(family=family), rank, 4)
        assert held == ParameterSlice(shape, dim, start, length, replicas)


@pytest.mark.parametrize("rows", [67, 5, 4])
def test_a_vocabulary_is_split_as_torch_chunk_splits_it(rows):
    """The last ranks may hold fewer rows, or none."""
    full = torch.arange(rows)
    chunks = [*full.chunk(4), full[:0], full[:0]][:4]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for rank, chunk in enumerate(chunks):
            held = slice_of_parameter(name, (rows, 32), spec(), rank, 4)
            assert held.cut(full).tolist() == chunk.tolist()
            assert held.local_shape == (len(chunk), 32) and held.replicas == 1


def test_a_cut_is_the_slice_of_the_full_tensor():
    full = torch.arange(12).view(3, 4)
    assert ParameterSlice((3, 4), 1, 2, 2, 1).cut(full).tolist() == [[2, 3], [6, 7], [10, 11]]
    assert full_slice((3, 4), 2).cut(full) is full
    assert full_slice((3, 4), 2).local_shape == (3, 4)


def test_kv_heads_are_held_by_several_ranks_where_they_are_few():
    assert [kv_replicas(spec(), tp) for tp in (1, 2, 4)] == [1, 1, 2]
    assert kv_replicas(spec(kv_heads=1), 4) == 4


def test_sizes_that_do_not_divide_the_model_are_refused():
    for size in (1, 2, 4):
        check_divisible(spec(), size)
    assert user_error(check_divisible, spec(), 3) == (
        "parallel.tp 3 does not divide the model (4 heads, 2 K/V heads, intermediate size 48): use "
        "one of 1, 2, 4"
    )
    assert "use one of 1, 3" in user_error(check_divisible, spec(heads=3, kv_heads=3), 2)
    assert user_error(check_divisible, spec(intermediate=45), 2).endswith("use one of 1")
    six = spec(heads=6, kv_heads=6)
    assert user_error(check_divisible, six, 4).endswith("use one of 1, 2, 3, 6")


def test_a_parameter_without_a_rule_is_a_programming_error():
    with pytest.raises(AssertionError, match="no slice for parameter"):
        slice_of_parameter("model.layers.0.mlp.gate_up_proj.weight", (4, 4), spec(), 0, 1)
