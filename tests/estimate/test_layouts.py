"""Which layouts are tried, what a GPU and a host need for one, and how it is printed."""

from __future__ import annotations

from collections import Counter

import pytest

from megalard.config.schema import ParallelConfig
from megalard.estimate.gpus import GIB, Machines, parse_gpus
from megalard.estimate.host import SAVED, host_memory
from megalard.estimate.layouts import Candidate, check_host_memory, layouts
from megalard.estimate.memory import Memory
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.report import duration, memory_lines
from tests.command_line import user_error
from tools.bench.random_model import random_spec

GPU = parse_gpus("8 x H100", None, None)[1]
MEMORY = Memory(Counter({"tensors": 50 * GIB}), 0, Counter({SAVED: 3 * GIB}), "main", "main", "x")
CANDIDATE = Candidate(RankLayout(4, 1, 1), MEMORY, {}, 80 * GIB)


def test_tp_stays_within_a_node():
    sizes = {one.tp for one in layouts(random_spec("llama2-7b", 4096), Machines(GPU, 2, 4, 1.0))}
    assert sizes == {1, 2}


def test_a_gpu_needs_a_gib_and_a_fiftieth_besides_the_tensors():
    assert CANDIDATE.needed == 52 * GIB


def test_a_node_needs_the_host_memory_of_its_ranks():
    """Four ranks of 3 GiB are refused where 5 % less than 12 GiB is too much."""
    check_host_memory(MEMORY, 4, 11.5 * GIB)
    check_host_memory(MEMORY, 4, None)
    sentence = user_error(check_host_memory, MEMORY, 4, 11.3 * GIB)
    assert "needs 12.0 GiB of host memory per node" in sentence
    lines = list(memory_lines(CANDIDATE, Machines(GPU, 4, 2, 1.0)))
    assert lines[-1] == f"{SAVED}: 3.00 GiB per GPU, 12.0 GiB per node"


def test_the_stream_that_saves_most_bytes_decides_the_host_memory():
    """It may save fewer tensors than another."""
    kinds = host_memory(None, None, [[8, 8, 8], [64]], ParallelConfig(offload=True))
    assert kinds == {SAVED: 64}


@pytest.mark.parametrize(
    ("seconds", "text"), [(119, "119.0 s"), (120, "2.0 min"), (7199, "120.0 min"), (7200, "2.0 h")]
)
def test_a_duration_has_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text
