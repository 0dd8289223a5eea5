"""Files of numpy: numbers are read, and every other file is a ValueError."""

from __future__ import annotations

import numpy as np
import pytest

from megalard.files.arrays import read_array


def npy(header: str, data: bytes = b"") -> bytes:
    """Return a file with any header, as numpy's documentation of the format describes it."""
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


BAD = {
    "nothing": b"",
    "text": b"1 2 3",
    "cut": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (9,), }", b"12"),
    "brackets": npy("(" * 300),
    "no literal": npy("__import__('os').system('id')"),
    "no text": npy("\x00{"),
    "unfinished": npy("{'descr': " + "'" * 3),
    "indent": npy("  {}\n {"),
    "huge": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10**6, 10**30), }"),
    "too large": npy(
        "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 18 + ",), }", b"12"
    ),
    "negative": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }", b"12"),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\x80\x04N."),
    "odd dtype": npy("{'descr': [('a', '<f8', 3, 4, 5)], 'fortran_order': False, 'shape': (1,), }"),
    "odd shape": npy("{'descr': '<f8', 'fortran_order': False, 'shape': 3, }"),
    "pickle": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85R.",
    "archive": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("mmap_mode", [None, "r"])
def test_what_is_no_array_is_a_value_error(kind, mmap_mode, tmp_path, recwarn):
    (tmp_path / "x.npy").write_bytes(BAD[kind])
    with pytest.raises(ValueError):
        read_array(tmp_path / "x.npy", mmap_mode=mmap_mode)
    assert not recwarn.list


def test_numbers_are_read(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "x.npy", values)
    assert np.array_equal(read_array(tmp_path / "x.npy"), values)
