"""Time the relation KL over a sharded sequence, forward and gradient, on 1, 2, ... ranks.

    torchrun --nproc-per-node 4 tools/bench/context.py [--lengths 32768 65536] [--json FILE]
    torchrun --nproc-per-node 4 tools/bench/context.py --attention
    python tools/bench/context.py --paper

For every length and every power of two up to the world size: the time of one layer's relation with
the difference-cover schedule, the same work without the transfers (what is not hidden is the
difference), and the same kernels under an all-gather of the rows, all from this one run.

With --attention, of one layer's attention to one document instead: gathering K and V first, the own
chunk first as the trainer does (in half precision, from 4096 tokens a rank), the same two without
the transfers, and a ring, with the peak memory of each beyond q, k and v. With --paper, which
starts eight processes itself, the bytes each would send on up to 64 ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import cache, partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from context_paper import print_paper

from megalard.data.batch import collate
from megalard.distill.terms import sharded_relations
from megalard.distill.terms.sharded_relations import Operand, RelationPlan, relation_sums
from megalard.kernels.relation_kl import chunk_mask, relation_backward, relation_forward
from megalard.model.attention import attend
from megalard.parallel.collectives import all_gather_tokens, reduce_scatter_tokens
from megalard.parallel.context import attention as context_attention
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import SINGLE, Axis, Mesh, build_mesh
from tools.bench.ring_attention import RingAttention


class NoExchange:
    """Stands in for ``Exchange``: what arrives is what was sent, at once."""

    sent_bytes = 0

    def __init__(self, tensors, to, source, axis):
        self.tensors = tensors

    def wait(self):
        return self.tensors


def by_schedule(x: Operand, plan: RelationPlan) -> None:
    relation_sums({"q": x}, {"q": 1.0}, plan, True)


def without_transfers(x: Operand, plan: RelationPlan) -> None:
    """The same work; the row statistics, which are small, are still reduced."""
    real, sharded_relations.Exchange = sharded_relations.Exchange, NoExchange
    try:
        by_schedule(x, plan)
    finally:
        sharded_relations.Exchange = real


def by_all_gather(x: Operand, plan: RelationPlan) -> None:
    """Every rank gathers all columns, computes its own rows, and scatters the column gradients."""
    shard, size = plan.shard, plan.shard.piece_length
    whole = Operand(shard.gather(x.student), shard.gather(x.teacher))
    columns = torch.zeros_like(whole.student, dtype=torch.float32)
    for place, piece in enumerate(shard.own_pieces):
        rows = x.rows(slice(place * size, (place + 1) * size))
        seen = whole.rows(slice(0, (piece + 1) * size))
        mask = plan.gather_masks[piece]
        args = (rows.student, rows.teacher, seen.student, seen.teacher)
        found = relation_forward(*args, mask=mask)
        _, grad = relation_backward(
            *args, found.lse_s, found.lse_t, mask=mask, out_dtype=torch.float32
        )
        columns[:, :, : seen.student.shape[2]] += grad
    if shard.axis.size > 1:
        parts = columns.to(x.student.dtype).unflatten(2, (shard.axis.size, -1)).movedim(2, 0)
        reduce_scatter_tokens(parts.contiguous(), shard.axis)


def make_plan(shard: SequenceShard, device: torch.device) -> RelationPlan:
    length = shard.length
    batch = collate([(torch.zeros(length, dtype=torch.int64).numpy(), [(0, length)])]).to(device)
    plan = RelationPlan(shard, batch.doc_start_bn, batch.doc_end_bn)
    size = shard.piece_length
    plan.gather_masks = {
        piece: chunk_mask(
            batch.doc_start_bn,
            batch.doc_end_bn,
            row_offset=piece * size,
            n=size,
            col_offset=0,
            m=(piece + 1) * size,
        )
        for piece in shard.own_pieces
    }
    return plan


def seconds(function, argument, axis: Axis, device: torch.device, repeats: int) -> float:
    """Median over repeats of the slowest rank's time."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device, axis)
        start = time.perf_counter()
        function(argument)
        synchronize(device, SINGLE)
        own = torch.tensor([time.perf_counter() - start], device=device)
        times.append(float(all_gather_tokens(own, axis).max()))
    return statistics.median(times[1:])


def synchronize(device: torch.device, axis: Axis) -> None:
    if axis.size > 1:
        dist.barrier(group=axis.group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(mesh: Mesh, axis: Axis, length: int, options: argparse.Namespace) -> dict:
    shard = SequenceShard(length, axis)
    shape = (1, options.heads, shard.own_length, options.head_dim)
    dtype = getattr(torch, options.dtype)
    x = Operand(*(torch.randn(shape, device=mesh.device, dtype=dtype) for _ in range(2)))
    plan = make_plan(shard, mesh.device)
    found = {"length": length, "ranks": axis.size}
    for function in (by_schedule, without_transfers, by_all_gather):
        work = partial(function, plan=plan)
        found[function.__name__] = seconds(work, x, axis, mesh.device, options.repeats)
    return found


def gathering(q, k, v, shard: SequenceShard) -> torch.Tensor:
    """What the trainer does where documents are packed."""
    return attend(q, shard.gather(k), shard.gather(v), shard.spans(((0, 0, shard.length),)), None)


def not_gathering(q, k, v, shard: SequenceShard) -> torch.Tensor:
    """The same work, on the own chunk in every place."""
    whole = (x.repeat(1, 1, shard.axis.size, 1) for x in (k, v))
    return attend(q, *whole, shard.spans(((0, 0, shard.length),)), None)


def own_first(q, k, v, shard: SequenceShard) -> torch.Tensor:
    """What the trainer does where one document fills the block of several ranks."""
    if shard.axis.size == 1:
        return gathering(q, k, v, shard)
    return context_attention.attend_own_chunk_first(q, k, v, shard.axis)


def ring(q, k, v, shard: SequenceShard) -> torch.Tensor:
    return RingAttention.apply(q, k, v, shard.axis).transpose(1, 2)


class Arrived:
    """Stands in for ``Posted``: random numbers that are there at once."""

    def __init__(self, x: torch.Tensor, tokens: int):
        self._result = _random((tokens, *x.shape[1:]), x.dtype, x.device)

    def wait(self) -> torch.Tensor:
        return self._result


@cache
def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Made once, so that it takes none of the measured time."""
    return torch.randn(shape, dtype=dtype, device=device)


def nothing_posted():
    """``own_first`` does the same work without its transfers."""
    return mock.patch.multiple(
        context_attention,
        post_all_gather_tokens=lambda x, axis: Arrived(x, x.shape[0] * axis.size),
        post_reduce_scatter_tokens=lambda x, axis: Arrived(x, x.shape[0] // axis.size),
    )


def measure_attention(mesh: Mesh, axis: Axis, length: int, options: argparse.Namespace) -> dict:
    """Times, and peak bytes of the fullest rank; what exchanges must agree."""
    shard = SequenceShard(length, axis)
    shape = (1, shard.own_length, options.heads, options.head_dim)
    dtype = getattr(torch, options.dtype)
    *x, weight = (torch.randn(shape, device=mesh.device, dtype=dtype) for _ in range(4))
    x = [tensor.transpose(1, 2).requires_grad_() for tensor in x]  # as projections lie
    found = {"length": length, "ranks": axis.size}

    def step(function) -> list[torch.Tensor]:
        out = function(*x, shard)
        return [out.detach(), *torch.autograd.grad(out, x, weight)]

    def note(name: str, function) -> None:
        if mesh.device.type == "cuda":
            step(function)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(function)
            peak = torch.tensor([torch.cuda.max_memory_allocated() - before], device=mesh.device)
            found[f"{name}_bytes"] = int(all_gather_tokens(peak, axis).max())
        found[name] = seconds(step, function, axis, mesh.device, options.repeats)

    expected = step(gathering)
    for function in (own_first, ring):
        _check_agreement(expected, step(function), function.__name__, axis)
    del expected
    for function in (gathering, not_gathering, own_first, ring):
        note(function.__name__, function)
    with nothing_posted():
        without = seconds(step, own_first, axis, mesh.device, options.repeats)
    found["own_first_without_transfers"] = without
    return found


def _check_agreement(
    expected: list[torch.Tensor], ours: list[torch.Tensor], name: str, axis: Axis
) -> None:
    """Outputs and gradients to 2e-2, which is the rounding of bf16 sums and far below an error."""
    for a, b in zip(expected, ours, strict=True):
        off = (a.double() - b.double()).norm() / a.double().norm()
        assert off < 2e-2, f"{name} and gathering differ by {off:.1e} on rank {axis.rank}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--attention", action="store_true", help="time attention over cp instead")
    parser.add_argument("--paper", action="store_true", help="bytes sent, by formula and counters")
    options = parser.parse_args()
    if options.paper:
        print_paper(max(options.lengths))
        return
    work = measure_attention if options.attention else measure
    mesh = build_mesh(options.device, 1)
    sizes = [2**k for k in range(mesh.world.size.bit_length()) if 2**k <= mesh.world.size]
    groups = {size: dist.new_group(list(range(size))) if size > 1 else None for size in sizes}
    results = []
    for length in options.lengths:
        for size in sizes:
            if mesh.world.rank < size:
                axis = SINGLE if size == 1 else Axis(groups[size], mesh.world.rank, size)
                results.append(work(mesh, axis, length, options))
            synchronize(mesh.device, mesh.world)
    if mesh.world.rank == 0:
        report_attention(results) if options.attention else report(results)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    if mesh.world.size > 1:
        dist.destroy_process_group()


def report(results: list[dict]) -> None:
    print("one relation, forward and gradient; ms, and gain over one rank")
    print(" length  ranks   schedule    gain   not hidden   all-gather    gain")
    single = {r["length"]: r["by_schedule"] for r in results if r["ranks"] == 1}
    for r in results:
        base, ours, gathered = single[r["length"]], r["by_schedule"], r["by_all_gather"]
        exposed = max(0.0, 1 - r["without_transfers"] / ours)
        print(
            f"{r['length']:7d} {r['ranks']:6d} {ours * 1e3:10.2f} {base / ours:7.2f} "
            f"{exposed:11.1%} {gathered * 1e3:12.2f} {base / gathered:7.2f}"
        )


def report_attention(results: list[dict]) -> None:
    print("attention of one layer, forward and backward; ms, and GiB beyond q, k and v")
    print(
        " length  ranks   gathering  not hidden    GiB   own chunk first  not hidden    GiB"
        "        ring    GiB"
    )
    for r in results:
        hidden = (r["not_gathering"], r["own_first_without_transfers"])
        exposed = [
            max(0.0, 1 - without / r[name])
            for without, name in zip(hidden, ("gathering", "own_first"), strict=True)
        ]
        memory = [r.get(f"{name}_bytes", 0) / 2**30 for name in ("gathering", "own_first", "ring")]
        print(
            f"{r['length']:7d} {r['ranks']:6d} {r['gathering'] * 1e3:11.2f} {exposed[0]:11.1%} "
            f"{memory[0]:6.2f} {r['own_first'] * 1e3:17.2f} {exposed[1]:11.1%} {memory[1]:6.2f} "
            f"{r['ring'] * 1e3:11.2f} {memory[2]:6.2f}"
        )


if __name__ == "__main__":
    main()
