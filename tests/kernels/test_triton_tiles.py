"""Tile sizes and shared device code of the Triton kernels; the latter in the interpreter."""

from types import SimpleNamespace

import pytest
import torch

from tests.kernels.cases import SMALL, case_params, check_case, ignore_masked_lanes
from tests.kernels.cases import needs_interpreter as interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
tiles = pytest.importorskip("megalard.kernels.relation_kl.triton.tiles")
pytestmark = ignore_masked_lanes


@pytest.mark.parametrize(
    ("shared_kilobytes", "expected"),
    [(99, (64, 32, 4, 2)), (163, (64, 32, 4, 2)), (227, (128, 64, 8, 3))],
)
def test_gpus_with_less_shared_memory_take_small_tiles(shared_kilobytes, expected, monkeypatch):
    """Consumer Ampere and Ada have 99 kB, A100 has 163 kB, H100 and later GPUs have 227 kB."""
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_kilobytes << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    operand = SimpleNamespace(
        is_cuda=True, device=None, shape=(1, 1, 1, 128), element_size=lambda: 2
    )
    assert tiles.choose_tiles(tiles.BACKWARD_TILES, operand) == expected


@interpreted
@case_params(SMALL)
def test_small_tiles_give_the_same_results(case, monkeypatch):
    monkeypatch.setattr(tiles, "FORWARD_TILES", tiles.SMALL_TILES)
    monkeypatch.setattr(tiles, "BACKWARD_TILES", tiles.SMALL_TILES)
    check_case(case, "triton")


@pytest.mark.parametrize(
    ("d", "padded"), [(1, 16), (16, 16), (17, 32), (80, 128), (128, 128), (256, 256)]
)
def test_head_dim_is_padded_to_a_power_of_two_of_at_least_16(d, padded):
    assert tiles.padded_dim(d) == padded


def test_a_section_holds_as_many_heads_as_its_bytes_allow():
    def swept(length: int):
        return torch.empty(1, 1, length, 64, dtype=torch.bfloat16, device="meta")

    assert tiles.section_heads(100, swept(1 << 15), swept(1 << 15)) == 4  # 4 MiB each
    assert tiles.section_heads(3, swept(1 << 15)) == 3
    assert tiles.section_heads(100, swept(1 << 20)) == 1


if triton is not None:

    @triton.jit
    def _block_of_program_kernel(out, blocks, heads, section, HEAVY_LAST: tl.constexpr):
        block, head = tiles.block_of_program(blocks, heads, section, HEAVY_LAST)
        tl.store(out + 2 * tl.program_id(0), block)
        tl.store(out + 2 * tl.program_id(0) + 1, head)

    @triton.jit
    def _tile_span_kernel(lo, hi, out, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        allowed = tiles.load_intervals(lo, hi, i, n)
        span = tiles.tile_span(allowed, i < n, BLOCK_N)
        out += 4 * tl.program_id(0)
        tl.store(out, span.start)
        tl.store(out + 1, span.full_start)
        tl.store(out + 2, span.full_end)
        tl.store(out + 3, span.end)


@interpreted
@pytest.mark.parametrize("heavy_last", [True, False])
@pytest.mark.parametrize(("heads", "section"), [(5, 2), (4, 4), (3, 1), (2, 7)])
def test_every_block_of_every_head_has_one_program_and_heavy_ones_start_first(
    heads, section, heavy_last
):
    blocks = 3
    out = torch.empty(blocks * heads, 2, dtype=torch.int32)
    _block_of_program_kernel[(blocks * heads,)](out, blocks, heads, section, HEAVY_LAST=heavy_last)
    programs = [tuple(pair) for pair in out.tolist()]
    assert sorted(programs) == [(block, head) for block in range(blocks) for head in range(heads)]
    for start in range(0, heads, section):
        of_section = [block for block, head in programs if start <= head < start + section]
        assert of_section == sorted(of_section, reverse=heavy_last)
        assert [x for x in programs if start <= x[1] < start + section] == programs[
            start * blocks : (start + section) * blocks
        ]


@interpreted
@pytest.mark.parametrize("seed", range(6))
def test_the_span_of_a_block_holds_its_visible_tiles_and_its_full_ones(seed):
    """Against every pair; some rows are empty, and the last block is not complete."""
    block_m, block_n, n, m = 16, 16, 75, 120
    generator = torch.Generator().manual_seed(seed)
    lo, hi = torch.randint(0, m + 1, (2, n), generator=generator).sort(0).values
    if seed % 2:  # wide intervals, so that some tiles are full
        lo, hi = lo // 8, m - (m - hi) // 8
    hi = torch.where(torch.rand(n, generator=generator) < 0.02 * seed, lo, hi)
    blocks = -(-n // block_m)
    out = torch.empty(blocks, 4, dtype=torch.int32)
    _tile_span_kernel[(blocks,)](lo.int(), hi.int(), out, n, BLOCK_M=block_m, BLOCK_N=block_n)
    j = torch.arange(-(-m // block_n)) * block_n
    for block, (start, full_start, full_end, end) in enumerate(out.tolist()):
        rows = slice(block * block_m, (block + 1) * block_m)
        row_lo, row_hi = lo[rows, None], hi[rows, None]
        meets = (row_lo < row_hi) & (row_lo < j + block_n) & (row_hi > j)
        visible = meets.any(0).nonzero()[:, 0].tolist()
        full = ((row_lo <= j) & (row_hi >= j + block_n)).all(0).nonzero()[:, 0].tolist()
        assert end == (visible[-1] + 1 if visible else 0)
        assert start == (visible[0] if visible else end)
        assert list(range(full_start, full_end)) == full
        assert full or full_start == end
