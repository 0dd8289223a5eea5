"""The relations over a sharded sequence with the Triton kernels, on ranks that are threads.

So the kernels compute the rectangles and triangles of any number of ranks in the interpreter and on
one GPU. ``test_sharded_relations`` tests the exchange between processes.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.distributed as dist

from megalard.config.objective import RELATIONS
from megalard.distill.terms import sharded_relations
from megalard.distill.terms.sharded_relations import Operand, RelationPlan, relation_sums
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import Axis
from tests.distill.terms.test_sharded_relations import WEIGHTS, dense, make_batch, make_operands
from tests.parity.compare import relative_error

pytest.importorskip("triton")


class Network:
    """Stands in for the network between threads.

    A value of one rank is available to the others once all ranks have given theirs.
    """

    def __init__(self, count: int):
        self.count, self._barrier = count, threading.Barrier(count, timeout=60)
        self._lock = threading.Lock()
        self._values: dict[tuple[int, int], object] = {}
        self._calls = [0] * count

    def one_at_a_time(self, kernel, *args, **kwargs):
        """Call a kernel; the interpreter has one state for all threads."""
        with self._lock:
            return kernel(*args, backend="triton", **kwargs)

    def _exchange(self, rank: int, value, sources: list[int]) -> list:
        call = self._calls[rank]
        self._calls[rank] += 1
        self._values[call, rank] = value
        self._barrier.wait()
        return [self._values[call, source] for source in sources]

    def all_reduce(self, x: torch.Tensor, axis: Axis, op=dist.ReduceOp.SUM) -> torch.Tensor:
        values = torch.stack(self._exchange(axis.rank, x.clone(), list(range(self.count))))
        return x.copy_(values.amax(0) if op == dist.ReduceOp.MAX else values.sum(0))

    def exchange(self, tensors, recipient, source, axis: Axis):
        (received,) = self._exchange(axis.rank, tensors, [source])
        return Received(received)


class Received:
    """Stands in for ``Exchange`` after its transfer."""

    sent_bytes = 0

    def __init__(self, tensors):
        self._tensors = tensors

    def wait(self):
        return self._tensors


def run_ranks_as_threads(count, length, operands, batch, weights) -> tuple[dict, dict]:
    """Return the sums over all ranks, and the gradients of the full sequence."""

    def rank(number: int):
        shard = SequenceShard(length, Axis(None, number, count))
        local = {
            kind: Operand(*(shard.cut(x, 2).contiguous() for x in pair))
            for kind, pair in operands.items()
        }
        plan = RelationPlan(shard, batch.doc_start_bn, batch.doc_end_bn)
        return relation_sums(local, weights, plan, True), shard.local_positions()

    with ThreadPoolExecutor(count) as threads:
        results = list(threads.map(rank, range(count)))
    sums = {name: sum(float(part[name]) for (part, _), _ in results) for name in weights}
    grads = {}
    for kind, (student, _) in operands.items():
        grads[kind] = torch.full_like(student, float("nan"), dtype=torch.float64)
        for (_, part), positions in results:
            grads[kind][:, :, positions.to(student.device)] = part[kind].double()
    return sums, grads


def check(count, length, dim, dtype, device, tolerances, monkeypatch, weights=WEIGHTS, blocks=3):
    """Compare sums and gradients with dense float64 autograd."""
    network = Network(count)
    for name in ("relation_forward", "relation_partials", "relation_backward"):
        kernel = partial(network.one_at_a_time, getattr(sharded_relations, name))
        monkeypatch.setattr(sharded_relations, name, kernel)
    monkeypatch.setattr(sharded_relations, "all_reduce", network.all_reduce)
    monkeypatch.setattr(sharded_relations, "Exchange", network.exchange)
    # Vectors so short that no row is saturated by its diagonal, where P_s - P_t would cancel.
    operands = {
        kind: tuple((x[:blocks] * 0.6).to(device, dtype) for x in pair)
        for kind, pair in make_operands(length, dim).items()
        if any(kind in RELATIONS[name].operands for name in weights)
    }
    batch = make_batch(length, blocks).to(device)
    sums, grads = run_ranks_as_threads(count, length, operands, batch, weights)
    exact_sums, exact_grads = dense(batch, operands, weights)
    for name, expected in exact_sums.items():
        assert sums[name] == pytest.approx(expected, rel=tolerances[0]), name
    for kind, expected in exact_grads.items():
        assert relative_error(grads[kind], expected) < tolerances[1], kind


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize("count", [2, 3])
def test_the_kernels_are_exact_in_the_interpreter(count, monkeypatch):
    """With one packed block, because the interpreter takes a second per launch."""
    # The rounding of fp32, as in test_sharded_relations.
    tolerances, weights = (5e-6, 5e-6), {"k": 2.0, "qk": 0.75}
    check(count, 6 * count, 8, torch.float32, "cpu", tolerances, monkeypatch, weights, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_kernels_are_exact_on_one_gpu(count, dim, dtype, monkeypatch):
    """On Hopper, half precision uses the Hopper kernels."""
    # The gradient is rounded on every rank, and again by the owner of the chunk.
    rounding = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 5e-5}[dtype]
    # Pieces of an odd number of tokens, which cover several tiles and whose halves differ.
    length = 2 * count * (1001 // count)
    check(count, length, dim, dtype, "cuda", (1e-4, rounding), monkeypatch)
