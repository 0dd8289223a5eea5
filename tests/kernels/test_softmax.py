"""The layout in which the Hopper forward keeps its sums per thread."""

import itertools

import pytest

softmax = pytest.importorskip("megalard.kernels.relation_kl.hopper.softmax")


def elements_of_threads(layout) -> list[list[tuple[int, ...]]]:
    """Return the elements of each of 128 threads, in the order of the thread's registers.

    In a linear layout the index of an element is the XOR of the bases of the bits of register, lane
    and warp that are set.
    """

    def combine(bases, number):
        total = [0] * len(layout.shape)
        for bit, basis in enumerate(bases):
            if number >> bit & 1:
                total = [x ^ y for x, y in zip(total, basis, strict=True)]
        return total

    threads = []
    for warp, lane in itertools.product(range(4), range(32)):
        of_thread = [combine(layout.warp_bases, warp), combine(layout.lane_bases, lane)]
        elements = []
        for register in range(1 << len(layout.reg_bases)):
            parts = [*of_thread, combine(layout.reg_bases, register)]
            elements.append(tuple(x ^ y ^ z for x, y, z in zip(*parts, strict=True)))
        threads.append(elements)
    return threads


@pytest.mark.parametrize("columns", [64, 128])
def test_four_lanes_share_a_row_and_each_keeps_a_quarter_of_its_columns(columns):
    """As the PTX ISA has the accumulators of wgmma, seen as [64, columns / 8, 4, 2]."""
    threads = elements_of_threads(softmax.quad_layout(columns))
    all_elements = itertools.product(range(64), range(columns // 8), range(4), range(2))
    assert sorted(x for of_thread in threads for x in of_thread) == list(all_elements)
    for thread, of_thread in enumerate(threads):
        row = thread // 32 * 16 + thread % 32 // 4
        for register, element in enumerate(of_thread):
            expected = (
                row + register // 2 % 2 * 8, register // 4, thread % 4, register % 2
            )  # fmt: skip
            assert element == expected
