"""Copies between host and GPU."""

from __future__ import annotations

import pytest
import torch

from megalard.transfer import to_device, to_host


def test_on_the_cpu_nothing_is_copied():
    x = torch.arange(3)
    assert to_device(x, torch.device("cpu")) is x
    assert to_host(x)() == [0, 1, 2]


@pytest.mark.gpu
def test_values_reach_the_gpu_and_come_back():
    x = torch.arange(1000.0)
    moved = to_device(x, torch.device("cuda"))
    assert moved.is_cuda and torch.equal(moved.cpu(), x)
    values = to_host(moved * 2)
    assert values() == (x * 2).tolist()
