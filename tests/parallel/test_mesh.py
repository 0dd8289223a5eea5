"""The mesh: which ranks share which axis, and devices and sizes that cannot work."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalard.errors import UserError
from megalard.parallel.mesh import (
    SINGLE,
    allowed_restarts,
    build_mesh,
    is_first_on_node,
    pick_device,
)
from tests.ranks import run_ranks


def _ranks_of(axis) -> list[int]:
    """Return the global ranks of an axis, gathered over it."""
    rank = dist.get_rank()
    if axis.size == 1:
        return [rank]
    ranks = [None] * axis.size
    dist.all_gather_object(ranks, rank, group=axis.group)
    return ranks


def _lay_out() -> None:
    """Eight ranks as dp 2 x cp 2 x tp 2; neighbors share tp, then cp, then dp."""
    mesh, rank = build_mesh("cpu", 2, 2), dist.get_rank()
    pair = rank // 2 * 2
    assert _ranks_of(mesh.world) == list(range(8)) and mesh.is_rank_0 == (rank == 0)
    assert _ranks_of(mesh.tp) == [pair, pair + 1] and mesh.tp.rank == rank % 2
    assert _ranks_of(mesh.cp) == sorted([rank, rank ^ 2]) and mesh.cp.rank == rank // 2 % 2
    assert _ranks_of(mesh.dp) == sorted([rank, rank ^ 4]) and mesh.dp.rank == rank // 4
    # Gradients are summed over dp and cp together.
    assert sorted(_ranks_of(mesh.data)) == [r for r in range(8) if r % 2 == rank % 2]
    assert mesh.holders(1) is mesh.data and mesh.holders(2) is mesh.world

    mesh = build_mesh("cpu", 8)
    four = rank // 4 * 4
    assert _ranks_of(mesh.holders(4)) == list(range(four, four + 4))
    assert mesh.holders(4).rank == rank % 4
    assert mesh.dp is SINGLE and mesh.cp is SINGLE

    # dp 2 and tp 4: pairs of neighbors hold the same K/V heads, once for each dp rank.
    mesh = build_mesh("cpu", 4)
    first = rank % 4 // 2 * 2
    assert _ranks_of(mesh.holders(2)) == [first, first + 1, first + 4, first + 5]
    assert _ranks_of(mesh.holders(1)) == sorted([rank, rank ^ 4])


def test_ranks_are_laid_out_as_dp_cp_tp():
    run_ranks(8, _lay_out)


def test_a_single_process_needs_no_process_group():
    mesh = build_mesh("cpu", 1)
    assert mesh.world is mesh.dp is mesh.cp is mesh.tp is mesh.data is SINGLE
    assert mesh.is_rank_0 and not dist.is_initialized()


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine on which torch sees two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize("rank", [0, 3])
def test_more_processes_than_gpus_are_refused_on_every_rank(rank, two_gpus, monkeypatch):
    """So that rank 0, which reports, refuses them too."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes were started on a machine with 2 GPUs"):
        pick_device("auto", rank)


def test_every_rank_has_its_own_gpu(two_gpus, monkeypatch):
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
    """launch/train.sh does not share the store; tests/launch restarts ranks with it."""
    environment = {"WORLD_SIZE": 2, "TORCHELASTIC_MAX_RESTARTS": 3}
    for name, value in {**environment, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    assert allowed_restarts() == 3
    with pytest.raises(UserError, match=r"--max-restarts 3.* set TORCH_DISABLE_SHARE_RDZV_TCP"):
        build_mesh("cpu", 2)


@pytest.mark.parametrize(("local_rank", "is_first"), [(None, True), ("0", True), ("3", False)])
def test_one_process_per_node_is_the_first(local_rank, is_first, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert is_first_on_node() == is_first
