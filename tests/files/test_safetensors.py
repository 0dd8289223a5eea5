"""Headers that are no safetensors headers."""

from __future__ import annotations

import json

import pytest

from megalard.files.safetensors import DamagedFile, TensorFile


@pytest.mark.parametrize("shape", [[-2, -2], [2.0, 2], [True, 4]], ids=str)
def test_a_shape_that_is_none_is_told(shape, tmp_path):
    header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(DamagedFile, match="is not a safetensors header"):
        TensorFile(tmp_path / "x")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"__metadata__": null}'], ids=["deep", "null"])
def test_a_header_of_odd_json_is_told(text, tmp_path):
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    with pytest.raises(DamagedFile, match="is not a safetensors header"):
        TensorFile(tmp_path / "x")
