"""The ranks' devices are refused alike on every rank, so that rank 0 can say why."""

from __future__ import annotations

import pytest
import torch

from megalard.errors import UserError
from megalard.parallel.mesh import build_mesh, pick_device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize("rank", [0, 3])
def test_more_processes_than_gpus_are_refused_on_every_rank(rank, two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes were started on a machine with 2 GPUs"):
        pick_device("auto", rank)


def test_every_rank_takes_a_gpu_of_its_own(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [pick_device("auto", rank) for rank in (0, 1)] == [
        torch.device("cuda", 0),
        torch.device("cuda", 1),
    ]
    assert pick_device("cpu", 0) == torch.device("cpu")


def test_ranks_that_tp_does_not_divide_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes were started: start a multiple of 2"):
        build_mesh("cpu", 2)


def test_restarts_by_a_torchrun_that_shares_its_store_are_refused(monkeypatch):
    """What is not refused is in tests/launch: train.sh, with the store of every start its own."""
    environment = {"WORLD_SIZE": 2, "TORCHELASTIC_MAX_RESTARTS": 3}
    for name, value in {**environment, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"--max-restarts 3.* set TORCH_DISABLE_SHARE_RDZV_TCP"):
        build_mesh("cpu", 2)
