"""The table of GPUs: names as people write them, and rates between the measured lengths."""

from __future__ import annotations

import json

import pytest

from megalard.estimate.gpus import GIB, GPUS, parse_gpus
from tests.command_line import user_error
from tests.processes import CHECKOUT


def parsed(text: str, **options: float) -> tuple[int, str]:
    count, gpu = parse_gpus(text, options.get("memory"), options.get("tflops"))
    return count, gpu.name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8 x H100 80GB", (8, "H100")),
        ("8 \u00d7 H100 80 GB", (8, "H100")),
        ("4xH200", (4, "H200")),
        ("NVIDIA H100 80GB HBM3", (1, "H100")),
        ("2 NVIDIA H100 PCIe", (2, "H100 PCIe")),
        ("1 x A100-SXM4-40GB", (1, "A100 40GB")),
        ("8 A100-SXM4-80GB", (8, "A100")),
        ("4 x NVIDIA GeForce RTX 4090", (4, "RTX 4090")),
        ("8 x B200 192GB", (8, "B200")),
        ("2 x H200 141GB", (2, "H200")),
        ("l40s 48gb", (1, "L40S")),
        ("8xH100PCIe", (8, "H100 PCIe")),
        ("A100 40 GB", (1, "A100 40GB")),
        ("rtx4090", (1, "RTX 4090")),
    ],
)
def test_names_as_people_and_drivers_write_them(text, expected):
    assert parsed(text) == expected


@pytest.mark.parametrize("text", ["", "8 x", "-3 x H100", "99999999 x H100", "8 x TPU v5", "H1000"])
def test_what_is_no_known_gpu_is_refused(text):
    assert "--gpus" in user_error(parse_gpus, text, None, None) or "table" in user_error(
        parse_gpus, text, None, None
    )


def test_another_size_of_memory_asks_for_it():
    assert "give --gpu-memory GIB" in user_error(parse_gpus, "8 x A100 64GB", None, None)
    _, gpu = parse_gpus("8 x A100 64GB", 63.5, None)
    assert gpu.memory == 63.5 * GIB and gpu.name == "A100"


def test_a_gpu_that_is_not_in_the_table_takes_memory_and_rate():
    count, gpu = parse_gpus("8 x MI300X 192GB", 191, 1307)
    assert (count, gpu.name, gpu.memory) == (8, "MI300X 192GB", 191 * GIB)
    assert not gpu.is_measured and gpu.peak == 1307e12
    h100 = next(gpu for gpu in GPUS if gpu.name == "H100")
    assert gpu.products == pytest.approx(h100.products * 1307 / 989)


@pytest.mark.parametrize("shape", [("d128", 128), ("d64", 64)])
def test_the_rates_of_the_h100_are_those_of_the_figures(shape):
    """At 4096 tokens the rate in a step, which is 0.88 of that of the benchmark."""
    name, head_dim = shape
    figures = json.loads((CHECKOUT / "docs/figures/relation.json").read_text())["speed"]
    h100 = next(gpu for gpu in GPUS if gpu.name == "H100")
    rates = h100.heads(head_dim)
    operations = {"relation": "relation", "cuDNN": "attention"}
    measured = [row for row in figures if row["shape"] == name and row["operation"] in operations]
    assert len(measured) == 20
    for row in measured:
        kernel = getattr(rates, f"{operations[row['operation']]}_{row['pass']}")
        expected = row["tflops"] * (0.88 if row["n"] == 4096 else 1)
        assert kernel.at(row["n"]) / 1e12 == pytest.approx(expected, abs=0.6), row


def test_rates_lie_between_those_of_the_measured_lengths():
    kernel = next(gpu for gpu in GPUS if gpu.name == "H100").heads(128).relation_forward
    assert kernel.at(4096) < kernel.at(8192) < kernel.at(16384)
    assert kernel.at(2048) == kernel.at(4096) / 2 and kernel.at(2**20) == kernel.at(131072)
