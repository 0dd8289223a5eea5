"""A rank whose partner has ended does not wait forever, and says why it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from megalard.parallel import watchdog
from megalard.parallel.mesh import start_process_group
from megalard.parallel.watchdog import watch_other_ranks
from tests.ranks import exit_codes, started_ranks, wait_until

PATIENCE_S = 2.0


def _wait_for_the_other(folder: str, is_leaving: bool) -> None:
    """Rank 0 takes part in no collective any more; rank 1 ends in the way that the test asks."""
    os.dup2(os.open(f"{folder}/errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    start_process_group("gloo")
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/reason-{dist.get_rank()}"
    watch_other_ranks(PATIENCE_S)
    rank = dist.get_rank()
    Path(folder, f"ready-{rank}").touch()
    if rank == 0 and is_leaving:
        dist.destroy_process_group()
        time.sleep(3 * PATIENCE_S)
        os._exit(0)
    if rank == 0:
        time.sleep(100)  # stands for a collective that never ends
    elif is_leaving:
        os._exit(0)
    signal.pause()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_a_rank_ends_after_the_rank_it_waits_for(number, tmp_path):
    with started_ranks(2, _wait_for_the_other, str(tmp_path), False) as ranks:
        wait_until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
        os.kill(ranks[1].pid, number)
        start = time.monotonic()
        assert exit_codes(ranks, 60) == [1, -number]
        assert time.monotonic() - start >= PATIENCE_S - 1
    assert (tmp_path / "errors").read_text() == (
        f"megalard: error: rank 0 ends: rank 1 (process {ranks[1].pid}) ended 2 s ago, and what "
        "this rank waits for will not come: run the same command to resume from the last "
        "checkpoint\n"
    )
    # The launcher starts the ranks again if it may, because nothing is wrong with the input.
    assert json.loads((tmp_path / "reason-0").read_text())["megalard"]["is_bad_input"] is False


def test_a_rank_watches_all_others_of_its_machine(monkeypatch):
    """The test is rank 1 of three ranks; rank 0 is on its machine, and rank 2 is not."""
    with subprocess.Popen(["sleep", "100"]) as other:
        places = [(watchdog._machine(), other.pid), (watchdog._machine(), os.getpid()), ("", 1)]

        def gather(values, value):
            assert value == places[1]
            values[:] = places

        started = []
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        monkeypatch.setattr(dist, "get_world_size", lambda: 3)
        monkeypatch.setattr(dist, "all_gather_object", gather)
        monkeypatch.setattr(
            watchdog.threading,
            "Thread",
            lambda **options: started.append(options["args"]) or Mock(),
        )
        watch_other_ranks(PATIENCE_S)
        other.kill()
    ((rank, others, patience_s),) = started
    assert (rank, [*others.values()], patience_s) == (1, [(0, other.pid)], PATIENCE_S)
    for descriptor in others:
        os.close(descriptor)


def test_a_rank_that_has_left_is_not_ended(tmp_path):
    """It may have work of its own to finish."""
    with started_ranks(2, _wait_for_the_other, str(tmp_path), True) as ranks:
        assert exit_codes(ranks, 60) == [0, 0]
    assert (tmp_path / "errors").read_text() == ""
