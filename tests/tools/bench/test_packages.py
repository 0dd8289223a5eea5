"""The comparison of optional packages, on a CPU, where only what a run uses without them exists."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.command_line import tool
from tools.bench import packages

benchmark = tool("bench.packages")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    file = tmp_path_factory.mktemp("packages") / "packages.json"
    with pytest.MonkeyPatch.context() as patch:
        cases = (packages.CASES[0], packages.CASES[2], packages.CASES[6])
        small = [replace(case, heads=4, kv_heads=2, head_dim=32) for case in cases]
        patch.setattr(packages, "CASES", [replace(case, rows=min(2, case.rows)) for case in small])
        assert benchmark("--device", "cpu", "--scale", 1024, "--repeats", 1, "--json", file) == 0
    return json.loads(file.read_text())["results"]


def test_every_part_has_a_time_and_the_error_of_fp32(results):
    assert {row["part"] for row in results} == set(packages.PARTS)
    for row in results:
        assert 0 < row["shortest"] <= row["seconds"] <= row["longest"]
        # A step of AdamW is the difference of two fp32 weights of about 500 times its size.
        tolerance = 1e-3 if row["part"] == "optimizer" else 1e-5
        assert all(0 < error < tolerance for error in row["errors"].values()), row


def test_packed_documents_cover_every_token():
    for case in packages.CASES:
        spans = case.spans(4096)
        assert sum(span.end - span.start for span in spans) == case.rows * 4096
