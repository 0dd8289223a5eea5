"""Inverse frequencies that are read from a file, and bad files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megalard.config.schema import RopeConfig
from megalard.errors import UserError
from megalard.model.rope import read_table
from tests.model.ropes import (
    DIM,
    NATIVE,
    THETA,
    cos_of_document,
    scaled,
    table_of,
    teacher,
    transformers_cos,
)

HYBRID = THETA ** -(np.arange(0, DIM, 2) / DIM) / [1, 1, 1, 2.5, 3, 8, 8, 8]


def save_table(folder, suffix: str, values=HYBRID) -> str:
    """Write inverse frequencies in the format of a suffix; return the path."""
    path = folder / f"table{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(np.asarray(values).tolist()))
    elif suffix == ".npy":
        np.save(path, values)
    else:
        np.savetxt(path, values)
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".npy", ".txt"])
def test_a_table_is_exported_with_the_frequencies_it_was_trained_with(suffix, tmp_path):
    path = save_table(tmp_path, suffix)
    np.testing.assert_array_equal(read_table(path, DIM), HYBRID)
    config = json.loads(json.dumps(scaled(RopeConfig("table", 8.0, table=path))))
    rope = config["rope_parameters"]
    assert rope["rope_type"] == "longrope" and rope["attention_factor"] == 1
    assert rope["short_factor"] == rope["long_factor"]
    table = table_of(config)
    np.testing.assert_allclose(table.inv_freq, HYBRID, rtol=2e-7)
    assert table.attention_scaling == 1 and table.long_inv_freq is None
    for length in (NATIVE // 2, 8 * NATIVE):
        assert torch.equal(cos_of_document(table, length), transformers_cos(config, length))


def test_a_table_replaces_any_scaling_of_the_teacher(tmp_path):
    spec = teacher(rope_scaling={"rope_type": "linear", "factor": 2.0})
    config = scaled(RopeConfig("table", 8.0, table=save_table(tmp_path, ".json")), spec)
    np.testing.assert_allclose(table_of(config).inv_freq, HYBRID, rtol=2e-7)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (HYBRID[:-1], r"has 7 inverse frequencies .* needs 8 \(head_dim / 2\)"),
        ([HYBRID, HYBRID], "has 16 inverse frequencies"),
        ([*HYBRID[:-1], 0], "finite and positive"),
        ([*HYBRID[:-1], float("nan")], "finite and positive"),
    ],
)
def test_a_wrong_table_is_refused(values, sentence, tmp_path):
    path = save_table(tmp_path, ".npy", np.asarray(values))
    with pytest.raises(UserError, match=sentence):
        scaled(RopeConfig("table", 8.0, table=path))


@pytest.mark.parametrize("suffix", [".json", ".npy", ".txt"])
def test_an_unreadable_table_is_refused(suffix, tmp_path):
    missing = tmp_path / f"missing{suffix}"
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        read_table(str(missing), DIM)
    missing.write_text("{ not it")
    with pytest.raises(UserError, match="cannot read inverse frequencies"):
        read_table(str(missing), DIM)
