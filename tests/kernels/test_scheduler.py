"""The order of work in the Hopper kernels, followed on the host through the device functions.

They run as Python, with operations on integers and tensors in the place of Gluon's.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from megalard.kernels.relation_kl import causal_mask, chunk_mask, full_mask, segment_bounds
from megalard.kernels.relation_kl.mask import IntervalMask
from tests.kernels.oracle import segment_ids

scheduler = pytest.importorskip("megalard.kernels.relation_kl.hopper.scheduler")
forward = pytest.importorskip("megalard.kernels.relation_kl.hopper.forward")
tiles = pytest.importorskip("megalard.kernels.relation_kl.hopper.tiles")
COLUMNS = tiles.STEP_COLUMNS.value
BLOCK = tiles.BACKWARD_BLOCK_ROWS.value
TileSpan, Interval = tiles.TileSpan, tiles.Interval


def value(x):
    return getattr(x, "value", x)


def where(condition, x, y):
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, value(x), value(y))
    return x if condition else y


ON_HOST = SimpleNamespace(
    where=where,
    minimum=min,
    maximum=max,
    min=lambda x, axis: int(x.min()),
    max=lambda x, axis: int(x.max()),
)


@pytest.fixture
def on_host(monkeypatch):
    """Let the device functions of the scheduler run, and call each other, on the host."""
    monkeypatch.setattr(scheduler, "gl", ON_HOST)
    monkeypatch.setattr(scheduler, "backward_tile", scheduler.backward_tile.fn)


def masks():
    """Yield (name, mask, is a self relation) of every kind: several blocks and ragged ends."""
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


all_masks = pytest.mark.parametrize(
    ("mask", "is_self"), [pytest.param(*x[1:], id=x[0]) for x in masks()]
)


@all_masks
def test_the_blocks_that_visit_a_tile_are_consecutive_and_visit_every_pair(mask, is_self):
    (start, end), last_blocks = scheduler.backward_order(mask, is_self)
    for i in range(mask.b):
        for j in range(last_blocks.shape[1]):
            visitors = [k for k in range(start.shape[1]) if start[i, k] <= j < end[i, k]]
            if visitors:
                assert visitors == list(range(visitors[0], int(last_blocks[i, j]) + 1))
            visible = (mask.col_lo_bn[i] < (j + 1) * BLOCK) & (mask.col_hi_bn[i] > j * BLOCK)
            visible &= mask.col_lo_bn[i] < mask.col_hi_bn[i]
            assert set((visible.nonzero()[:, 0] // BLOCK).tolist()) <= set(visitors)
            if is_self:  # block j is the last to add to tile j, because the first visitor adds last
                assert visitors[0] == j


@all_masks
@pytest.mark.parametrize("share", [1, 3])
def test_the_turns_at_a_tile_count_up_from_0_later_blocks_first(mask, is_self, share):
    """``share`` heads add to the same tile, the heads of one block one after another."""
    (start, end), last_blocks = scheduler.backward_order(mask, is_self)
    for i, j in itertools.product(range(mask.b), range(last_blocks.shape[1])):
        visitors = [k for k in range(start.shape[1]) if start[i, k] <= j < end[i, k]]
        turns = [
            scheduler.backward_turn.fn(int(last_blocks[i, j]), block, row_head, share)
            for block in reversed(visitors)
            for row_head in range(2 * share, 3 * share)
        ]
        assert turns == list(range(share * len(visitors)))


@pytest.mark.parametrize("span", [(0, 0, 3, 3), (1, 2, 5, 8), (2, 6, 6, 6), (4, 4, 4, 4)])
def test_the_backward_visits_each_column_of_its_span_once_and_full_tiles_first(span, on_host):
    span = TileSpan(*span)
    count = 2 * (span.end - span.start)
    starts = [int(value(scheduler.backward_step_start.fn(step, span))) for step in range(count)]
    columns = [column for start in starts for column in range(start, start + COLUMNS)]
    tile = tiles.BACKWARD_TILE_COLUMNS.value
    assert sorted(columns) == list(range(span.start * tile, span.end * tile))
    full = columns[: (span.full_end - span.full_start) * tile]
    assert full == list(range(span.full_start * tile, span.full_end * tile))
    for first, second in zip(starts[::2], starts[1::2], strict=True):
        assert first % tile == 0 and second == first + COLUMNS


@pytest.mark.parametrize("mask", [pytest.param(mask, id=name) for name, mask, _ in masks()])
def test_each_block_of_the_forward_visits_the_tiles_that_its_rows_see(mask):
    """The expected tiles come from all pairs. Each block occurs once, the longest blocks first."""
    j = torch.arange(-(-mask.m // COLUMNS)) * COLUMNS
    for rows, i in itertools.product((128, 192), range(mask.b)):
        blocks = scheduler.forward_plan(mask, rows, COLUMNS)[i]
        assert sorted(blocks[:, 0].tolist()) == list(range(-(-mask.n // rows)))
        lengths = blocks[:, 4] - blocks[:, 1]
        assert torch.equal(lengths, lengths.sort(descending=True).values)
        for block, start, full_start, full_end, end in blocks.tolist():
            lo, hi = (
                x[i, block * rows : (block + 1) * rows, None]
                for x in (mask.col_lo_bn, mask.col_hi_bn)
            )
            meets = (lo < hi) & (lo < j + COLUMNS) & (hi > j)
            visible = meets.any(0).nonzero()[:, 0].tolist()
            full = ((lo <= j) & (hi >= j + COLUMNS)).all(0).nonzero()[:, 0].tolist()
            assert end == (visible[-1] + 1 if visible else 0)
            assert start == (visible[0] if visible else end)
            assert list(range(full_start, full_end)) == full
            assert full or full_start == end


def random_intervals(kind: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lo and hi, int64 [n], some empty, of up to 700 rows over up to 900 columns."""

    def draw(low: int, high: int, size: tuple[int, ...] = (1,)) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    n, m = int(draw(1, 700)), int(draw(1, 900))
    ends = draw(0, m + 1, (2, n)).sort(0).values
    if kind == "sorted":
        ends = ends.sort(1).values
    elif kind == "causal":
        ends = torch.stack((torch.zeros(n).long(), torch.arange(n) + draw(-200, 600)))
    elif kind == "at tiles' edges":
        ends = torch.stack((draw(0, 3, (n,)) * COLUMNS, draw(3, 8, (n,)) * COLUMNS))
        ends[1] += draw(-1, 2, (n,))
    empty = torch.rand(n, generator=generator) < [0.0, 0.02, 0.9][int(draw(0, 3))]
    lo, hi = ends.clamp(0, m).masked_fill(empty, 0)
    return lo, hi


@pytest.mark.parametrize(
    "warpgroups", [shape.row_warpgroups for shape in forward.SHAPE_OF_HEAD_DIM.values()]
)
@pytest.mark.parametrize("kind", ["any", "sorted", "causal", "at tiles' edges"])
@pytest.mark.parametrize("seed", range(20))
def test_every_pair_is_added_once_and_every_row_meets_a_tile_while_maxima_run(
    warpgroups, kind, seed, on_host
):
    """The test follows ``forward._consume``: exact steps, masked steps, then the full tiles."""
    lo, hi = random_intervals(kind, torch.Generator().manual_seed(seed))
    n, none = len(lo), torch.zeros(1, 1, dtype=torch.int32)
    mask = IntervalMask(lo[None].int(), hi[None].int(), none, none)
    for block, *numbers in scheduler.forward_plan(mask, warpgroups * 64, COLUMNS)[0].tolist():
        span = TileSpan(*numbers)
        visited = [scheduler.forward_tile.fn(step, span) for step in range(span.end - span.start)]
        assert sorted(visited) == list(range(span.start, span.end))
        edges = len(visited) - (span.full_end - span.full_start)
        for warpgroup in range(warpgroups):
            i = (block * warpgroups + warpgroup) * 64 + torch.arange(64)
            inside = i < n
            rows = Interval(*(torch.where(inside, x[i.clamp(max=n - 1)], 0) for x in (lo, hi)))
            nonempty = rows.lo < rows.hi
            visible, exact = scheduler.exact_steps.fn(rows, span, COLUMNS)
            added, met = torch.zeros(64).long(), torch.zeros(64).bool()
            for step, start in enumerate(tile * COLUMNS for tile in visited):
                pairs = rows.hi.clamp(max=start + COLUMNS) - rows.lo.clamp(min=start)
                if step >= max(exact, edges):
                    pairs = torch.where(nonempty, COLUMNS, 0)
                elif not (start < visible.hi and start + COLUMNS > visible.lo):
                    continue
                added += pairs.clamp(min=0)
                met |= (pairs > 0) & (step < exact)
            assert torch.equal(added[nonempty], (rows.hi - rows.lo)[nonempty])
            assert met[nonempty].all()


def test_plans_are_made_once_per_mask():
    mask = causal_mask(1, 500)
    assert scheduler.backward_order(mask, True) is scheduler.backward_order(mask, True)
    assert scheduler.forward_plan(mask, 192, 64) is scheduler.forward_plan(mask, 192, 64)
