"""The benchmark of the relation's kernels, on a CPU."""

from __future__ import annotations

import json

import pytest
import torch

from megalard.kernels.relation_kl import causal_mask, relation_backward, relation_forward
from tests.command_line import tool
from tools.bench import relation_speed
from tools.bench.relation_accuracy import dense_relation
from tools.bench.relation_speed import HALF_PRODUCTS, Shape

relation = tool("bench.relation")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The JSON of a run of both parts, with few heads and the Triton kernels interpreted."""
    file = tmp_path_factory.mktemp("relation") / "relation.json"
    shapes = {
        "d64": Shape(2, 2, 16),
        "grouped": Shape(2, 1, 16),
        "packed": Shape(2, 2, 16, is_packed=True),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relation_speed, "SHAPES", shapes)
        options = ("--lengths", 32, "--repeats", 1, "--head-dims", 16, "--accuracy-tokens", 48)
        assert relation(*options, "--shapes", *shapes, "--device", "cpu", "--json", file) == 0
    return json.loads(file.read_text())


def test_every_dtype_is_compared_with_float64(report):
    errors = {row["dtype"]: row for row in report["accuracy"]}
    assert set(errors) == {"float32", "bfloat16", "float16"}
    for row in errors.values():
        assert row["head_dim"] == 16
        assert 0 < row["kl_max_error"] < 1e-5 and 0 < row["gradient_error_fp32"] < 1e-5
    # Rounding to the dtype of the operands: 8 and 11 bits.
    assert 5e-4 < errors["bfloat16"]["gradient_error_stored"] < 4e-3
    assert 5e-5 < errors["float16"]["gradient_error_stored"] < 5e-4


def test_attention_is_the_reference_of_every_shape_and_length(report):
    operations = {(r["shape"], r["operation"], r["pass"]) for r in report["results"]}
    names = {"attention", "relation"}
    if relation_speed.operations_on(CPU) != ["attention", "relation"]:
        names.add("Triton relation")
    assert operations == {
        (shape, name, side)
        for shape in ("d64", "grouped", "packed")
        for name in names
        for side in ("forward", "backward")
    }
    rates = {(r["shape"], r["operation"], r["pass"]): r["flops"] for r in report["results"]}
    for result in report["results"]:
        reference = rates[result["shape"], "attention", result["pass"]]
        assert result["of_attention"] == pytest.approx(result["flops"] / reference)
        assert result["of_product"] == pytest.approx(result["flops"] / report["product_flops"])


def test_rates_count_half_products_over_the_allowed_pairs(report):
    for result in report["results"]:
        halves = HALF_PRODUCTS[result["operation"]][result["pass"] == "backward"]
        # One document of 32 tokens, or documents of 9, 5, 1, 7, 3 and 7: the lengths are cut down
        # to whole tokens, and the last one has what remains.
        documents = [9, 5, 1, 7, 3, 7] if result["shape"] == "packed" else [32]
        pairs = sum(length**2 // 2 for length in documents)
        flops = halves * 2 * 16 * 2 * pairs
        assert result["flops"] == pytest.approx(flops / result["seconds"]["median"])


@pytest.mark.parametrize("tokens", [16, 100, 4096])
def test_documents_fill_the_sequence(tokens):
    lengths = Shape(is_packed=True).documents(tokens)
    assert sum(lengths) == tokens and min(lengths) > 0
    assert Shape().documents(tokens) == [tokens]


def test_the_dense_relation_is_the_relation():
    x, y = torch.randn(2, 1, 2, 24, 8, dtype=torch.float64)
    kl, gradient = dense_relation(x, y)
    mask = causal_mask(1, 24)
    lse_s, lse_t, actual = relation_forward(x, y, mask=mask)
    torch.testing.assert_close(actual.double(), kl, atol=1e-6, rtol=1e-6)
    result = relation_backward(x, y, None, None, lse_s, lse_t, mask=mask)
    torch.testing.assert_close(result, gradient, atol=1e-6, rtol=1e-5)


def test_an_operation_that_cannot_run_is_reported_and_skipped(report, monkeypatch, capsys):
    def refuse(*arguments):
        raise RuntimeError("no kernel of this kind\nand a second line")

    monkeypatch.setitem(relation_speed.OPERATIONS, "relation", refuse)
    monkeypatch.setattr(relation_speed, "operations_on", lambda device: ["attention", "relation"])
    monkeypatch.setattr(relation_speed, "SHAPES", {"d64": Shape(2, 2, 16)})
    options = ("--lengths", 32, "--repeats", 1, "--skip-accuracy", "--shapes", "d64")
    assert relation(*options, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "no kernel of this kind" in printed and "second line" not in printed
