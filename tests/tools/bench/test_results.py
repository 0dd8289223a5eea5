"""How benchmarks report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tools.bench.results import Table, describe_environment, write_json
from tools.bench.timing import Seconds, measure_matrix_product, time_runs


def test_columns_are_aligned(capsys):
    table = Table("a", "a long heading", ("wide", 12))
    table.row(1, 2.5, "x")
    table.row("only one")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "        a  a long heading          wide"
    assert lines[1] == "        1             2.5             x"
    assert lines[2] == " only one"


def test_json_has_everything_that_results_depend_on(tmp_path):
    options = argparse.Namespace(json=tmp_path / "x.json", tokens=[64], scratch=Path("/a/disk"))
    environment = describe_environment(torch.device("cpu"))
    write_json(options.json, environment, options, [{"seconds": 1.0}], product_flops=2.0)
    content = json.loads(options.json.read_text())
    assert {"device", "megalard", "torch", "triton", "transformers"} <= content[
        "environment"
    ].keys()
    assert content["options"] == {"tokens": [64], "scratch": "/a/disk"}
    assert content["results"] == [{"seconds": 1.0}] and content["product_flops"] == 2.0


def test_runs_to_warm_up_do_not_count():
    calls = []
    seconds = time_runs(lambda: calls.append(1), torch.device("cpu"), repeats=4)
    assert len(calls) == 7 and 0 < seconds.shortest <= seconds.median <= seconds.longest
    assert Seconds.of([3.0, 1.0, 2.0]) == Seconds(2.0, 1.0, 3.0)


def test_the_product_is_measured():
    product = measure_matrix_product(torch.device("cpu"), torch.float32)
    assert product.size == 512 and product.flops > 1e8
    assert str(product).startswith("512³ float32 matrix product: ")
