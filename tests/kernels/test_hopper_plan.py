"""The Hopper forward's order of tiles, followed on the host through the kernel's own functions.

`tile_of_step` and `_seen` are run as Python, with a language of whole numbers and tensors in the
place of Gluon's.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megalard.kernels.relation_kl.mask import IntervalMask

forward = pytest.importorskip("megalard.kernels.relation_kl.hopper.forward")
plan = pytest.importorskip("megalard.kernels.relation_kl.hopper.scheduler_plan")
COLUMNS = forward.BLOCK_COLUMNS


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


@pytest.fixture(autouse=True)
def on_host(monkeypatch):
    for module in (forward, plan):
        monkeypatch.setattr(module, "gl", ON_HOST)


def random_intervals(kind: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """lo and hi, int64 [n], some of them empty, of up to 700 rows over up to 900 columns."""

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
    "groups", [blocks.groups for blocks in forward.BLOCKS_OF_HEAD_DIM.values()]
)
@pytest.mark.parametrize("kind", ["any", "sorted", "causal", "at tiles' edges"])
@pytest.mark.parametrize("seed", range(20))
def test_every_pair_is_swept_once_and_every_row_is_met_while_maxima_run(groups, kind, seed):
    """As `_consume` goes: exact steps, masked steps, then the tiles that all rows see."""
    lo, hi = random_intervals(kind, torch.Generator().manual_seed(seed))
    n, none = len(lo), torch.zeros(1, 1, dtype=torch.int32)
    mask = IntervalMask(lo[None].int(), hi[None].int(), none, none)
    for block, *span in plan.block_plan(mask, groups * 64, COLUMNS)[0].tolist():
        first, full_first, full_last, last = span
        tiles = [plan.tile_of_step.fn(step, span) for step in range(last - first)]
        assert sorted(tiles) == list(range(first, last))
        edges = len(tiles) - (full_last - full_first)
        for group in range(groups):
            i = (block * groups + group) * 64 + torch.arange(64)
            inside = i < n
            own_lo, own_hi = (torch.where(inside, x[i.clamp(max=n - 1)], 0) for x in (lo, hi))
            live = own_lo < own_hi
            (seen_first, seen_last), exact = forward._seen.fn(own_lo, own_hi, span, COLUMNS)
            swept, met = torch.zeros(64).long(), torch.zeros(64).bool()
            for step, start in enumerate(tile * COLUMNS for tile in tiles):
                visible = own_hi.clamp(max=start + COLUMNS) - own_lo.clamp(min=start)
                if step >= max(exact, edges):
                    visible = torch.where(live, COLUMNS, 0)
                elif not (start < seen_last and start + COLUMNS > seen_first):
                    continue
                swept += visible.clamp(min=0)
                met |= (visible > 0) & (step < exact)
            assert torch.equal(swept[live], (own_hi - own_lo)[live])
            assert met[live].all()
