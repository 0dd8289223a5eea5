"""The comparison with the authors' code, with plain products in place of their kernels."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.command_line import one_error, tool
from tests.processes import CHECKOUT
from tools.bench import authors, authors_plot
from tools.bench.authors_model import load_kernel

benchmark = tool("bench.authors")

# What their function returns: the KL of all rows of all heads, summed, of causal row softmaxes.
DENSE = """
import torch


def attn_kl_align(x, x2, y, y2, attn_mask, causal, sm_scale_s, sm_scale_t):
    assert causal and attn_mask.all()
    length = x.shape[2]
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)

    def log_p(a, b, scale):
        scores = a.float() @ b.float().mT * scale
        return scores.masked_fill(future, float("-inf")).log_softmax(-1)

    student, teacher = log_p(x, x2, sm_scale_s), log_p(y, y2, sm_scale_t)
    difference = (teacher - student).masked_fill(future, 0.0)
    return FACTOR * (teacher.exp() * difference).sum()
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A function that makes a checkout of their repository whose loss is multiplied by a factor."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(factor: float):
        package = tmp_path / f"authors-{factor}" / "kernels" / "attention_KL"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "integration.py").write_text(DENSE.replace("FACTOR", str(factor)))
        for name in ("attention_KL", "attention_KL.integration"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        return package.parents[1]

    yield make
    for name in ("attention_KL", "attention_KL.integration"):
        sys.modules.pop(name, None)


def options(checkout, *more: object) -> list[object]:
    return ["--checkout", checkout, "--device", "cpu", "--parity-tokens", 48, *more]


def test_the_same_loss_is_found_the_same(checkout, tmp_path, capsys):
    path = tmp_path / "authors.json"
    assert benchmark(*options(checkout(1.0), "--skip-time", "--json", path)) == 0
    (result,) = json.loads(path.read_text())["results"]
    parity = result["parity"]
    exact = parity["loss"]["float32"]
    # Theirs is computed in bf16, of models in bf16; its errors are those of our loss in bf16.
    assert exact > 0 and parity["loss"]["authors"] == pytest.approx(exact, rel=0.02)
    for key in ("authors", "bfloat16"):
        for projection in "qkv":
            assert 0 < parity["gradient_distance"][key][projection] < 0.05
    printed = capsys.readouterr().out
    assert f"{exact:.8f}" in printed and "megalard, bf16" in printed


def test_another_loss_is_found_another(checkout, tmp_path):
    path = tmp_path / "authors.json"
    assert benchmark(*options(checkout(2.0), "--skip-time", "--json", path)) == 0
    (result,) = json.loads(path.read_text())["results"]
    parity = result["parity"]
    assert parity["loss"]["authors"] == pytest.approx(2 * parity["loss"]["float32"], rel=0.02)
    for projection in "qkv":
        assert parity["gradient_distance"]["authors"][projection] == pytest.approx(1, abs=0.05)


def test_a_micro_step_of_both_is_timed(checkout, tmp_path, capsys):
    path = tmp_path / "times.json"
    words = ("--shape", "tiny", "--tokens", 32, "--lora-rank", 4, "--repeats", 2, "--json", path)
    assert benchmark(*options(checkout(1.0), *words)) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert set(result["time"]) == {"authors", "megalard"}
    assert all(value["seconds"] > 0 for value in result["time"].values())
    assert "a micro-step of 32 tokens, LoRA rank 4" in capsys.readouterr().out


def test_the_distance_of_gradients_is_relative_and_over_all_layers():
    exact = {"0.q_proj": torch.tensor([3.0]), "1.q_proj": torch.tensor([4.0])}
    these = {"0.q_proj": torch.tensor([3.0]), "1.q_proj": torch.tensor([5.0])}
    exact["0.k_proj"] = these["0.k_proj"] = torch.tensor([1.0])
    assert authors._relative_distance(these, exact, "q_proj") == pytest.approx(0.2)
    assert authors._relative_distance(these, exact, "k_proj") == 0


def test_another_directory_is_refused(tmp_path, capsys):
    assert benchmark(*options(tmp_path)) == 1
    assert "has no kernels/attention_KL" in one_error(capsys.readouterr().err)


def test_their_function_is_loaded_from_the_checkout(checkout):
    kernel = load_kernel(checkout(1.0))
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 5)
    assert kernel(x, x, x, x, attn_mask=mask, causal=True, sm_scale_s=1.0, sm_scale_t=1.0) == 0


def test_the_committed_measurement_can_be_drawn(tmp_path):
    figures = CHECKOUT / "docs" / "figures"
    picture = tmp_path / "speed.png"
    assert authors_plot.main([str(figures / "authors.json"), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
