"""A layout cuts one slice of one dimension."""

from __future__ import annotations

import torch

from megalard.model.layout import Layout, full_layout


def test_a_layout_cuts_its_slice_as_a_view():
    full = torch.arange(24).reshape(4, 6)
    rows, columns = Layout((4, 6), 0, 1, 2, 1), Layout((4, 6), 1, 3, 3, 1)
    assert rows.cut(full).tolist() == [[*range(6, 12)], [*range(12, 18)]]
    assert columns.cut(full).tolist() == [[3, 4, 5], [9, 10, 11], [15, 16, 17], [21, 22, 23]]
    assert (rows.local_shape, columns.local_shape) == ((2, 6), (4, 3))
    assert columns.cut(full).untyped_storage().data_ptr() == full.untyped_storage().data_ptr()


def test_a_full_layout_is_on_every_rank():
    layout = full_layout((4, 6), tp=3)
    assert (layout.dim, layout.local_shape, layout.replicas) == (None, (4, 6), 3)
    full = torch.zeros(4, 6)
    assert layout.cut(full) is full
