"""A run that cannot fit is refused at its start; preflight compares estimate and measurement."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from megalard.estimate.memory import Memory
from megalard.training import estimated
from tests.command_line import megalard, refusal, user_error
from tests.jobs import arguments

GIB = 2**30


def memory(gib: float) -> Memory:
    kinds = Counter({"gradients": gib * GIB})
    return Memory(kinds, 0, Counter(), "main", "main", "the logits")


def test_a_run_is_refused_only_beyond_the_error_of_the_estimate():
    sentence = user_error(estimated.refuse_if_too_large, memory(85), 80 * GIB)
    assert "the run needs 85.0 GiB per GPU (± 5%; gradients 85.0) but the GPU has 80.0" in sentence
    assert "megalard plan lists the layouts that fit" in sentence
    for fits in (84, 80, 10):
        estimated.refuse_if_too_large(memory(fits), 80 * GIB)


def test_training_stops_before_weights_are_read(small_job, tmp_path, capsys, monkeypatch):
    """As on a GPU of 1 MiB; the weights of the model would be missed if they were read."""

    class SmallGpu:
        total_memory = 2**20

    monkeypatch.setattr(estimated, "_is_gpu", lambda mesh: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SmallGpu)
    monkeypatch.setattr("megalard.train.Run", None)
    line = refusal(capsys, "train", *arguments(small_job, tmp_path / "output"))
    assert re.search(r"the run needs 0\.\d GiB per GPU .* but the GPU has 0\.0 GiB", line)


def test_training_stops_if_its_host_has_too_little_memory(small_job, tmp_path, capsys, monkeypatch):
    class LargeGpu:
        total_memory = 2**40

    monkeypatch.setattr(estimated, "_is_gpu", lambda mesh: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: LargeGpu)
    monkeypatch.setattr(estimated, "host_memory_of_node", lambda: 2**10)
    monkeypatch.setattr("megalard.train.Run", None)
    words = arguments(small_job, tmp_path / "output", "parallel.offload_optimizer=true")
    line = refusal(capsys, "train", *words)
    assert re.search(r"the run needs 0\.\d GiB of host memory per node .* a node has 0\.0", line)


def test_the_memory_of_a_host_is_that_of_the_container(monkeypatch):
    with open("/proc/meminfo", encoding="ascii") as file:
        physical = int(file.readline().split()[1]) * 1024
    limits = {"max": physical, "2097152": 2097152, str(2 * physical): physical}
    for limit, expected in limits.items():
        monkeypatch.setattr(estimated.Path, "read_text", lambda path, encoding, x=limit: f"{x}\n")
        assert estimated.host_memory_of_node() == expected


def test_a_cpu_refuses_nothing(small_job, tmp_path, monkeypatch):
    monkeypatch.setattr(estimated, "refuse_if_too_large", None)
    words = arguments(small_job, tmp_path / "output", "optimizer.steps=1")
    assert megalard("train", *words) == 0


@pytest.mark.parametrize(
    ("mode", "is_offloaded", "kind"),
    [
        ("lora", False, "moments of AdamW"),
        ("all", False, "moments of AdamW"),
        ("all", True, "optimizer's state in host memory"),
    ],
)
def test_preflight_prints_estimate_and_measurement(
    mode, is_offloaded, kind, small_job, tmp_path, capsys
):
    """On a CPU these are the tensors between steps, which agree exactly."""
    options = (
        f"trainable.mode={mode}",
        f"parallel.offload_optimizer={str(is_offloaded).lower()}",
    )
    assert megalard("preflight", *arguments(small_job, tmp_path / "output", *options)) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.split() == ["estimate", "measured"])
    rows = {}
    for line in lines[start + 1 : -1]:
        name, estimate, value = re.split(r"\s{2,}", line)
        rows[name] = (estimate, value)
    assert all(estimate == value for estimate, value in rows.values()), rows
    assert rows["gradients"][0] != "0.0 KiB" and rows[kind][0] != "0.0 KiB"
    assert lines[-1] == "preflight passed; nothing was written"
