"""The slabs of the columns' gradient: their order, and their sum."""

import pytest
import torch

from tests.kernels.cases import ignore_masked_lanes, needs_interpreter
from tests.kernels.test_softmax import elements_of_threads

column_buffer = pytest.importorskip("megalard.kernels.relation_kl.hopper.column_buffer")
pytestmark = ignore_masked_lanes


def accumulator_place(rows: torch.Tensor, cols: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (thread, register) of the elements of a wgmma accumulator (PTX ISA, wgmma)."""
    thread = rows // 16 * 32 + rows % 8 * 4 + cols % 8 // 2
    register = cols // 8 * 4 + rows % 16 // 8 * 2 + cols % 2
    return thread, register


@needs_interpreter
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("unit", [None, 0.25])
def test_slabs_are_summed_and_put_in_order(d, copies, unit):
    b, heads, tiles, m = 2, 2, 2, 200
    rows, cols = torch.meshgrid(torch.arange(64), torch.arange(d), indexing="ij")
    thread, register = accumulator_place(rows, cols)
    visits = torch.randint(0, 3, (b, heads * copies, tiles), dtype=torch.int32)
    buffer = torch.randn(b, heads * copies, tiles * 128, d)
    buffer.unflatten(2, (tiles, 128))[visits == 0] = torch.nan  # never written
    flat = buffer.view(b, heads * copies, 2 * tiles, 64 * d)
    added = flat[..., register // 4 * 512 + thread * 4 + register % 4]
    added = added.unflatten(2, (tiles, 2)).where(visits[..., None, None, None] > 0, 0.0)
    expected = added.flatten(2, 4).unflatten(1, (heads, copies)).sum(2)[:, :, :m]
    factor = None if unit is None else torch.tensor([unit])
    out = column_buffer.columns_gradient(
        buffer, visits, torch.empty(b, heads, m, d), 3.0, factor, torch.float32
    )
    # The sums of three copies are taken in another order.
    torch.testing.assert_close(out, expected * 3.0 * (unit or 1.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d", [64, 128])
def test_a_thread_adds_16_bytes_at_a_time_and_a_warp_512_consecutive_bytes(d):
    """Each element of the slab [d / 8, 128, 4] lies in one register of the thread of axis 1."""
    elements = elements_of_threads(column_buffer.slab_layout(d))
    assert sorted(x for of_thread in elements for x in of_thread) == [
        (i, j, k) for i in range(d // 8) for j in range(128) for k in range(4)
    ]
    for thread, of_thread in enumerate(elements):
        assert of_thread == [(i, thread, k) for i in range(d // 8) for k in range(4)]
