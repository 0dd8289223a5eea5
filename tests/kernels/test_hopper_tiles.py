"""The sizes of the Hopper kernels agree with each other and with the chip."""

import math

import pytest
import torch

tiles = pytest.importorskip("megalard.kernels.relation_kl.hopper.tiles")
forward = pytest.importorskip("megalard.kernels.relation_kl.hopper.forward")
backward = pytest.importorskip("megalard.kernels.relation_kl.hopper.backward")
forward_tile = pytest.importorskip("megalard.kernels.relation_kl.hopper.forward_tile")
column_buffer = pytest.importorskip("megalard.kernels.relation_kl.hopper.column_buffer")
triton_tiles = pytest.importorskip("megalard.kernels.relation_kl.triton.tiles")

REGISTERS_PER_MULTIPROCESSOR = 1 << 16
PROGRAMS_PER_MULTIPROCESSOR = {64: 2, 128: 1}


def test_sizes_that_must_agree_do():
    # Tile i of a self relation must hold the rows of block i as columns.
    assert tiles.BACKWARD_BLOCK_ROWS.value == tiles.BACKWARD_TILE_COLUMNS.value
    # An accumulator of D^T X and a slab of the buffer are the columns of one step.
    assert column_buffer.SLAB_COLUMNS.value == tiles.STEP_COLUMNS.value
    # The slots of D are indexed by the parity of the step, and a tile must start in slot 0.
    assert tiles.STEPS_PER_TILE.value == 2
    # Both row warpgroups of the backward fill one block.
    assert tiles.BACKWARD_BLOCK_ROWS.value == 2 * tiles.WARPGROUP_ROWS.value


def test_both_dialects_share_one_definition_of_each_constant():
    assert tiles.BEYOND is triton_tiles.BEYOND
    assert forward.LN2 is triton_tiles.LN2 and forward.LOG2E is triton_tiles.LOG2E
    assert triton_tiles.BEYOND.value == torch.iinfo(torch.int32).max
    assert triton_tiles.LN2.value == pytest.approx(math.log(2), rel=1e-15)
    assert triton_tiles.LOG2E.value == pytest.approx(math.log2(math.e), rel=1e-15)


@pytest.mark.parametrize("d", [64, 128])
def test_the_registers_of_the_forward_fit_the_multiprocessor(d):
    """At launch, and after the producer's warpgroup handed registers to the row warpgroups."""
    shape, programs = forward.SHAPE_OF_HEAD_DIM[d], PROGRAMS_PER_MULTIPROCESSOR[d]
    at_launch = (shape.row_warpgroups + 1) * 128 * shape.launch_registers
    rows = shape.row_warpgroups * 128 * shape.row_registers
    after = rows + 128 * forward.PRODUCER_REGISTERS.value
    assert programs * max(at_launch, after) <= REGISTERS_PER_MULTIPROCESSOR
    assert after <= at_launch
    assert shape.launch_registers % 8 == shape.row_registers % 8 == 0  # setmaxnreg


def test_the_registers_of_the_backward_fit_the_multiprocessor():
    at_launch = 4 * 128 * backward.LAUNCH_REGISTERS
    registers = (
        backward.ROW_REGISTERS, backward.ROW_REGISTERS,
        backward.REDUCER_REGISTERS, backward.PRODUCER_REGISTERS,
    )  # fmt: skip
    assert 128 * sum(x.value for x in registers) <= at_launch <= REGISTERS_PER_MULTIPROCESSOR
    assert all(x.value % 8 == 0 for x in registers)


def test_the_product_of_a_hidden_pair_is_exact_to_scale_and_far_below_every_score():
    """Scaling a power of two is exact, so hidden - maximum cannot exceed 0 by rounding."""
    hidden = torch.tensor(forward_tile.HIDDEN.value, dtype=torch.float32)
    assert torch.frexp(hidden).mantissa.abs() == 0.5
    for scale in (1e-3, 0.0883883461, 1.0, 30.0):
        scaled = hidden * torch.tensor(scale, dtype=torch.float32)
        assert scaled.double() == hidden.double() * torch.tensor(scale).double()
        assert scaled.isfinite() and (scaled - scaled.neg()).isfinite()
    # The products of fp16 vectors of the largest head_dim, 128, are larger than half of it.
    assert forward_tile.HIDDEN.value * 0.5 < -128 * 65504.0**2


def test_descriptors_replace_the_strides_of_dimensions_of_size_1():
    x = torch.empty(1, 4, 300, 64, dtype=torch.bfloat16).as_strided(
        (1, 4, 300, 64), (7, 300 * 64, 64, 1)
    )
    descriptor = tiles.tma_descriptor(x, 64)
    assert list(descriptor.shape) == [1, 4, 300, 64]
    assert list(descriptor.strides) == [64, 300 * 64, 64, 1]
    assert list(descriptor.block_shape) == [1, 1, 64, 64]
