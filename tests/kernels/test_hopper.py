"""The Hopper kernels' choice, schedule and compilation, as far as a CPU can see them."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megalard.kernels.relation_kl import (
    causal_mask,
    chunk_mask,
    describe_kernels,
    full_mask,
    segment_bounds,
)
from tests.kernels.oracle import segment_ids

hopper = pytest.importorskip("megalard.kernels.relation_kl.hopper.support")
order = pytest.importorskip("megalard.kernels.relation_kl.hopper.scheduler_order")
plan = pytest.importorskip("megalard.kernels.relation_kl.hopper.scheduler_plan")


def fake_tensor(shape=(1, 4, 300, 128), stride=None, dtype=torch.bfloat16, address=1 << 20):
    """What the choice reads of a CUDA tensor."""
    real = torch.empty(shape, dtype=dtype, device="meta")
    stride = stride or real.stride()
    return SimpleNamespace(
        shape=real.shape,
        dtype=dtype,
        device=torch.device("cuda:0"),
        is_cuda=True,
        stride=lambda dim=None: stride if dim is None else stride[dim],
        element_size=real.element_size,
        data_ptr=lambda: address,
    )


def fake_relation(of_cols=None, causal=True, **of_rows):
    """A relation of operands described as in ``fake_tensor``; without columns the self relation."""
    rows = fake_tensor(**of_rows)
    cols = rows if of_cols is None else fake_tensor(**of_cols)
    return SimpleNamespace(
        rows_s=rows, rows_t=rows, cols_s=cols, cols_t=cols,
        is_self=of_cols is None, mask=SimpleNamespace(causal=causal),
    )  # fmt: skip


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(hopper, "AVAILABLE", True)
    monkeypatch.setattr(hopper.tiling, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    "relation",
    [
        {},
        {"dtype": torch.float16, "shape": (2, 8, 33, 64)},
        {"stride": (4 * 300 * 128, 128, 4 * 128, 1)},  # [b, n, heads, d] storage
        {"stride": (7, 300 * 128, 128, 1)},  # the stride of a dimension of size 1 is never used
        {"of_cols": {"shape": (1, 1, 700, 128)}},
    ],
    ids=str,
)
def test_training_shapes_take_the_hopper_kernels(relation, on_hopper):
    assert hopper.serves(fake_relation(**relation))
    assert hopper.serves_backward(fake_relation(**relation))


@pytest.mark.parametrize(
    "relation",
    [
        {"dtype": torch.float32},
        {"shape": (1, 4, 300, 80)},
        {"shape": (1, 4, 300, 256)},
        {"stride": (4 * 300 * 132, 300 * 132, 132, 1)},  # 264 bytes from vector to vector
        {"stride": (0, 0, 128, 1)},
        {"address": (1 << 20) + 8},
        {"of_cols": {"shape": (1, 1, 700, 128), "stride": (1, 1, 1, 700)}},
    ],
    ids=str,
)
def test_other_operands_take_plain_triton(relation, on_hopper):
    assert not hopper.serves(fake_relation(**relation))
    assert not hopper.serves_backward(fake_relation(**relation))


def test_other_devices_and_versions_take_plain_triton(on_hopper, monkeypatch):
    relation = fake_relation()
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert not hopper.serves(relation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "AVAILABLE", False)
    assert not hopper.serves(relation)
    monkeypatch.setattr(hopper, "AVAILABLE", True)
    monkeypatch.setattr(hopper.tiling, "INTERPRETED", True)
    assert not hopper.serves(relation)


def test_the_user_is_told_which_kernels_run(on_hopper, monkeypatch):
    gpu = torch.device("cuda:0")
    assert describe_kernels(torch.device("cpu")) == "plain torch"
    assert describe_kernels(gpu) == "Hopper's"
    monkeypatch.setattr(hopper, "AVAILABLE", False)
    monkeypatch.setattr(hopper, "REASON", "the reason")
    assert describe_kernels(gpu).startswith("Triton; ")
    assert describe_kernels(gpu).endswith(": the reason")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert describe_kernels(gpu) == "Triton"


def test_a_self_relation_that_sees_the_future_takes_the_plain_backward(on_hopper):
    relation = fake_relation(causal=False)
    assert hopper.serves(relation) and not hopper.serves_backward(relation)
    pair = fake_relation(of_cols={}, causal=False)
    assert hopper.serves_backward(pair)


def masks():
    """(name, mask, self relation) of every kind, over several blocks and with ragged ends."""
    for layout in ("single", "left_pad", "both_pad", "all_pad", "packed", "packed_pad"):
        for s in (100, 1000, 2100):
            bounds = segment_bounds(segment_ids(layout, 2, s))
            for name, row, n, col, m in (
                ("self", 0, s, 0, s),
                ("late rows", s // 2, s - s // 2, 0, s),
                ("late columns", 0, s, s // 3, s // 2),
                ("past", s // 2, s // 4, 0, s // 2),
                ("future", 0, s // 2, s // 2, s // 3),
            ):
                for causal in (True, False):
                    mask = chunk_mask(
                        *bounds, row_offset=row, n=n, col_offset=col, m=m, causal=causal
                    )
                    yield f"{layout}-{s}-{name}-{causal}", mask, False
                    if name == "self" and causal:
                        yield f"{layout}-{s}-itself", mask, True
    yield "full", full_mask(1, 700, 1300), False


@pytest.mark.parametrize(("mask", "is_self"), [pytest.param(*x[1:], id=x[0]) for x in masks()])
def test_each_tile_is_added_to_in_turns_without_gaps(mask, is_self):
    """Every pair is visited; who visits a tile is consecutive, and the last of them is known."""
    block = order.BLOCK
    (first, last), last_rows = order.reduction_order(mask, is_self)
    for i in range(mask.b):
        for j in range(last_rows.shape[1]):
            visitors = [k for k in range(first.shape[1]) if first[i, k] <= j < last[i, k]]
            if visitors:
                assert visitors == list(range(visitors[0], int(last_rows[i, j]) + 1))
            seen = (mask.col_lo_bn[i] < (j + 1) * block) & (mask.col_hi_bn[i] > j * block)
            seen &= mask.col_lo_bn[i] < mask.col_hi_bn[i]
            assert set((seen.nonzero()[:, 0] // block).tolist()) <= set(visitors)
            if is_self:  # the block itself is the last to add to its own columns
                assert visitors[0] == j


@pytest.mark.parametrize("mask", [pytest.param(mask, id=name) for name, mask, _ in masks()])
def test_each_block_visits_what_its_rows_see(mask):
    """The plan's tiles against every pair; the blocks once each, the longest first."""
    columns = 64
    j = torch.arange(-(-mask.m // columns)) * columns
    for rows, i in itertools.product((128, 192), range(mask.b)):
        blocks = plan.block_plan(mask, rows, columns)[i]
        assert sorted(blocks[:, 0].tolist()) == list(range(-(-mask.n // rows)))
        lengths = blocks[:, 4] - blocks[:, 1]
        assert torch.equal(lengths, lengths.sort(descending=True).values)
        for block, first, full_first, full_last, last in blocks.tolist():
            lo, hi = (
                x[i, block * rows : (block + 1) * rows, None]
                for x in (mask.col_lo_bn, mask.col_hi_bn)
            )
            some = ((lo < hi) & (lo < j + columns) & (hi > j)).any(0).nonzero()[:, 0].tolist()
            whole = ((lo <= j) & (hi >= j + columns)).all(0).nonzero()[:, 0].tolist()
            assert last == (some[-1] + 1 if some else 0)
            assert first == (some[0] if some else last)
            assert list(range(full_first, full_last)) == whole
            assert whole or full_first == last


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("unit", [None, 0.25])
def test_slabs_are_added_up_and_put_in_order(d, copies, unit):
    """Each element is found where the accumulator's layout (PTX ISA, wgmma) has it."""
    slab = pytest.importorskip("megalard.kernels.relation_kl.hopper.column_buffer")
    b, heads, tiles, m = 2, 2, 2, 200
    rows, cols = torch.meshgrid(torch.arange(64), torch.arange(d), indexing="ij")
    thread = rows // 16 * 32 + rows % 8 * 4 + cols % 8 // 2
    register = cols // 8 * 4 + rows % 16 // 8 * 2 + cols % 2
    visits = torch.randint(0, 3, (b, heads * copies, tiles), dtype=torch.int32)
    buffer = torch.randn(b, heads * copies, tiles * 128, d)
    buffer.unflatten(2, (tiles, 128))[visits == 0] = torch.nan  # never written
    flat = buffer.view(b, heads * copies, 2 * tiles, 64 * d)
    added = flat[..., register // 4 * 512 + thread * 4 + register % 4]
    added = added.unflatten(2, (tiles, 2)).where(visits[..., None, None, None] > 0, 0.0)
    expected = added.flatten(2, 4).unflatten(1, (heads, copies)).sum(2)[:, :, :m]
    factor = None if unit is None else torch.tensor([unit])
    out = slab.columns_gradient(
        buffer, visits, torch.empty(b, heads, m, d), 3.0, factor, torch.float32
    )
    # sums of three, in another order
    torch.testing.assert_close(out, expected * 3.0 * (unit or 1.0), rtol=1e-6, atol=1e-6)


def test_the_schedule_is_made_once_for_a_mask():
    mask = causal_mask(1, 500)
    assert order.reduction_order(mask, True) is order.reduction_order(mask, True)
    assert plan.block_plan(mask, 192, 64) is plan.block_plan(mask, 192, 64)


def test_masks_know_whether_they_are_causal():
    bounds = segment_bounds(segment_ids("packed_pad", 2, 60))
    chunk = dict(n=20, m=30)
    assert causal_mask(1, 5).causal and causal_mask(1, 5).to("cpu").causal
    assert chunk_mask(*bounds, row_offset=7, col_offset=7, **chunk).causal
    assert not chunk_mask(*bounds, row_offset=7, col_offset=7, **chunk, causal=False).causal
    assert not chunk_mask(*bounds, row_offset=20, col_offset=7, **chunk).causal
    assert not full_mask(1, 5, 5).causal


@pytest.mark.skipif(hopper.hopper_forward is None, reason=hopper.REASON)
def test_both_kernels_compile_for_hopper():
    """For a target without a device, in a process of its own since this one may interpret."""
    script = Path(__file__).with_name("compile_hopper.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(script.parents[2])
    run = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
