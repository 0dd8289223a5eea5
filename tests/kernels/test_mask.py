"""Interval masks describe the same pairs from both sides, and exactly the pairs they promise."""

import pytest
import torch

from megalard.kernels.relation_kl import (
    IntervalMask,
    causal_mask,
    chunk_mask,
    document_mask,
    full_mask,
    places_mask,
    segment_bounds,
    segment_mask,
)
from megalard.kernels.relation_kl.mask import split_into_blocks
from tests.kernels.oracle import dense_allowed, segment_ids

LAYOUTS = ["single", "left_pad", "right_pad", "both_pad", "all_pad", "packed", "packed_pad"]


@pytest.mark.parametrize("shapes", [((1, 6), (1, 5)), ((2, 6), (1, 6)), ((6,), (6,))])
def test_bounds_of_documents_have_one_shape_with_rows(shapes):
    start, end = (torch.zeros(shape, dtype=torch.int32) for shape in shapes)
    with pytest.raises(ValueError, match=r"must both be \[b, s\]"):
        chunk_mask(start, end, row_offset=0, n=2, col_offset=0, m=2, causal=True)


def dense_sides(mask):
    """Return the allowed pairs, bool [b, n, m], as the rows have them and as the columns do."""
    i, j = torch.arange(mask.n), torch.arange(mask.m)
    from_rows = (j >= mask.col_lo_bn[..., None]) & (j < mask.col_hi_bn[..., None])
    from_cols = (i >= mask.row_lo_bm[..., None]) & (i < mask.row_hi_bm[..., None])
    return from_rows, from_cols.mT


def assert_mask_is(mask, allowed):
    """Assert that both sides of a mask allow exactly the pairs ``allowed``, bool [b, n, m]."""
    for side in dense_sides(mask):
        assert torch.equal(side, allowed)
    for lo, hi in ((mask.col_lo_bn, mask.col_hi_bn), (mask.row_lo_bm, mask.row_hi_bm)):
        assert lo.dtype == hi.dtype == torch.int32
        assert not (lo > hi).any() and not lo[lo == hi].any(), "empty intervals must be (0, 0)"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_segment_mask_allows_exactly_its_documents(layout, causal):
    ids_bs = segment_ids(layout, 3, 23)
    assert_mask_is(segment_mask(ids_bs, causal=causal), dense_allowed(ids_bs, causal))


def test_rows_see_no_later_tokens_unless_it_is_asked_for():
    ids_bs = segment_ids("packed", 2, 12)
    assert_mask_is(segment_mask(ids_bs), dense_allowed(ids_bs, True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_of_chunk_pairs_are_rectangles_of_the_mask_of_the_sequence(layout, causal):
    s, size = 24, 6
    ids_bs = segment_ids(layout, 2, s)
    bounds, allowed = segment_bounds(ids_bs), dense_allowed(ids_bs, causal)
    for row in range(0, s, size):
        for col in range(0, s, size + 2):
            mask = chunk_mask(
                *bounds, row_offset=row, n=size, col_offset=col, m=size + 2, causal=causal
            )
            assert_mask_is(mask, allowed[:, row : row + size, col : col + size + 2])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_places_apart_from_each_other_see_what_they_see_in_the_sequence(layout, causal):
    s = 24
    ids_bs = segment_ids(layout, 2, s)
    bounds, allowed = segment_bounds(ids_bs), dense_allowed(ids_bs, causal)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 24):
        rows, cols = (torch.randperm(s, generator=generator)[:size].sort().values for _ in range(2))
        for i, j in ((rows, cols), (rows, rows), (rows, rows[:3]), (rows[:3], rows)):
            common = min(len(i), len(j))
            aligned = torch.equal(i[:common], j[:common])
            mask = places_mask(*bounds, i, j, aligned=aligned, causal=causal)
            assert_mask_is(mask, allowed[:, i][:, :, j])
            assert mask.causal == (causal and aligned)


@pytest.mark.parametrize("places", [(torch.arange(5), torch.arange(5)), (torch.arange(3),) * 2])
def test_the_caller_says_whether_places_are_aligned_and_no_place_is_read_back(places, monkeypatch):
    """A comparison of the places would wait for the device they are on."""
    bounds = segment_bounds(torch.zeros(1, 5))
    for name in ("equal", "allclose"):
        monkeypatch.setattr(torch, name, None)
    for aligned in (True, False):
        assert places_mask(*bounds, *places, aligned=aligned).causal == aligned
        assert not places_mask(*bounds, *places, aligned=aligned, causal=False).causal


def test_masks_of_chunks_are_causal_if_their_rows_and_columns_are_aligned():
    bounds = segment_bounds(segment_ids("packed_pad", 2, 60))
    chunk = dict(n=20, m=30)
    assert causal_mask(1, 5).causal and causal_mask(1, 5).to("cpu").causal
    assert chunk_mask(*bounds, row_offset=7, col_offset=7, **chunk).causal
    assert not chunk_mask(*bounds, row_offset=7, col_offset=7, **chunk, causal=False).causal
    assert not chunk_mask(*bounds, row_offset=20, col_offset=7, **chunk).causal
    assert not full_mask(1, 5, 5).causal


def test_results_that_depend_on_a_mask_are_computed_once_per_mask_and_arguments():
    calls = []

    def make(mask, factor):
        calls.append(factor)
        return mask.n * factor

    mask = causal_mask(1, 5)
    assert [mask.cached(make, factor) for factor in (2, 3, 2)] == [10, 15, 10]
    assert calls == [2, 3]
    assert causal_mask(1, 6).cached(make, 2) == 12


def test_the_last_block_of_rows_is_padded():
    blocks = split_into_blocks(torch.arange(10).view(2, 5), 3, -1)
    assert blocks.tolist() == [[[0, 1, 2], [3, 4, -1]], [[5, 6, 7], [8, 9, -1]]]


def test_causal_and_full_masks_allow_what_their_names_say():
    assert_mask_is(causal_mask(2, 9), torch.ones(2, 9, 9, dtype=torch.bool).tril())
    assert_mask_is(full_mask(2, 5, 7), torch.ones(2, 5, 7, dtype=torch.bool))


def test_document_mask_takes_the_bounds_of_documents():
    start_bs = torch.tensor([[0, 0, 2, 2, 0]])
    end_bs = torch.tensor([[2, 2, 4, 4, 0]])
    ids_bs = torch.tensor([[0, 0, 1, 1, -1]])
    assert_mask_is(document_mask(start_bs, end_bs), dense_allowed(ids_bs, True))


def test_bad_masks_are_refused():
    with pytest.raises(ValueError, match="contiguous run"):
        segment_mask(torch.tensor([[0, 1, 0]]))
    with pytest.raises(ValueError, match="contiguous run"):
        segment_mask(torch.tensor([[0, -1, 0]]))
    segment_mask(torch.tensor([[-1, 0, -1, -2, 1], [7, 7, 3, 3, -1]]))
    with pytest.raises(ValueError, match="inside the sequence"):
        chunk_mask(*segment_bounds(torch.zeros(1, 8)), row_offset=4, n=5, col_offset=0, m=8)
    x = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="int32"):
        IntervalMask(x.long(), x, x, x)
    with pytest.raises(ValueError, match="must be"):
        IntervalMask(x, x[:, :3], x, x)
