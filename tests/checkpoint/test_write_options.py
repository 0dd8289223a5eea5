"""What the writers of models have in common."""

from __future__ import annotations

import pytest

from megalard.checkpoint.write_options import FILE_BYTES, WriteOptions, split_by_size


@pytest.mark.parametrize(
    ("sizes", "limit", "files"),
    [
        ({}, 10, []),
        ({"a": 4, "b": 4, "c": 4}, 10, [["a", "b"], ["c"]]),
        ({"a": 4, "b": 6, "c": 4}, 10, [["a", "b"], ["c"]]),
        # A tensor that is larger than a file has a file of its own.
        ({"a": 1, "b": 50, "c": 1, "d": 1}, 10, [["a"], ["b"], ["c", "d"]]),
        ({"a": 0, "b": 0}, 1, [["a", "b"]]),
    ],
)
def test_names_are_split_in_order_into_files_of_a_size(sizes, limit, files):
    assert split_by_size(sizes, limit) == files


def test_files_have_four_gibibytes_unless_another_size_is_given():
    options = WriteOptions()
    assert options.file_bytes == FILE_BYTES == 4 * 1024**3
    assert options.companions == () and options.before_commit() is None
    assert options.progress(3) is None
