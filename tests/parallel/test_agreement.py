"""An error of one rank is raised on all ranks, so that all of them stop."""

from __future__ import annotations

import threading

import pytest
import torch

from megalard.errors import UserError
from megalard.parallel.agreement import (
    checked_meanwhile,
    checked_on_all_ranks,
    from_rank_0,
    gather_objects,
)
from megalard.parallel.mesh import SINGLE, build_mesh
from tests.ranks import run_ranks


def _agree() -> None:
    world = build_mesh("cpu", 1).world
    # An error on rank 1 alone.
    with pytest.raises(UserError, match="the disk of rank 1"), checked_on_all_ranks(world):
        if world.rank == 1:
            raise UserError("the disk of rank 1")
    # The first of two errors is raised everywhere.
    with pytest.raises(UserError, match="the disk of rank 0"), checked_on_all_ranks(world):
        raise UserError(f"the disk of rank {world.rank}")

    def check() -> None:
        if world.rank == 1:
            raise UserError("a checksum on rank 1")

    with (
        checked_meanwhile(check, world) as wait,
        pytest.raises(UserError, match="a checksum on rank 1"),
    ):
        wait()
    assert gather_objects((world.rank, "x"), world) == [(0, "x"), (1, "x")]
    assert from_rank_0(None if world.rank else "value", world) == "value"
    # The ranks are still in step.
    with checked_on_all_ranks(world):
        pass


def test_an_error_of_one_rank_is_raised_on_all():
    run_ranks(2, _agree)


def test_other_exceptions_are_not_turned_into_user_errors():
    with pytest.raises(ZeroDivisionError), checked_on_all_ranks(SINGLE):
        raise ZeroDivisionError


def test_a_check_runs_while_the_block_runs():
    in_check, in_block = threading.Event(), threading.Event()

    def check() -> None:
        in_check.set()
        assert in_block.wait(60), "the block did not run meanwhile"

    with checked_meanwhile(check, SINGLE) as wait:
        assert in_check.wait(60), "the check did not begin before it was waited for"
        in_block.set()
        wait()


def test_a_single_process_agrees_with_itself():
    assert not torch.distributed.is_initialized()
    assert gather_objects(3, SINGLE) == [3] and from_rank_0("x", SINGLE) == "x"
