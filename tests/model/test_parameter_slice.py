"""It cuts a full tensor along one dimension."""

from __future__ import annotations

import torch

from megalard.model.parameter_slice import ParameterSlice, full_slice


def test_a_slice_is_cut_as_a_view():
    full = torch.arange(24).reshape(4, 6)
    rows, columns = ParameterSlice((4, 6), 0, 1, 2, 1), ParameterSlice((4, 6), 1, 3, 3, 1)
    assert rows.cut(full).tolist() == [[*range(6, 12)], [*range(12, 18)]]
    assert columns.cut(full).tolist() == [[3, 4, 5], [9, 10, 11], [15, 16, 17], [21, 22, 23]]
    assert (rows.local_shape, columns.local_shape) == ((2, 6), (4, 3))
    assert columns.cut(full).untyped_storage().data_ptr() == full.untyped_storage().data_ptr()


def test_a_full_slice_is_on_every_rank():
    held = full_slice((4, 6), tp=3)
    assert (held.dim, held.local_shape, held.replicas) == (None, (4, 6), 3)
    full = torch.zeros(4, 6)
    assert held.cut(full) is full
