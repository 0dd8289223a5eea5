"""Time the relation KL over a sharded sequence, forward and gradient, on 1, 2, ... ranks.

    torchrun --nproc-per-node 4 tools/bench_context.py [--lengths 32768 65536] [--json FILE]

For every length and every power of two up to the world size: the time of one layer's relation with
the difference-cover schedule, the same work without the transfers (what is not hidden is the
difference), and the same kernels under an all-gather of the rows, all from this one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megalard.data.batch import collate
from megalard.distill import sharded_relation
from megalard.distill.sharded_relation import Operand, RelationPlan, relation_sums
from megalard.kernels.relation_kl import chunk_mask, relation_backward, relation_forward
from megalard.parallel.collectives import all_gather_tokens, reduce_scatter_tokens
from megalard.parallel.context import SequenceShard
from megalard.parallel.mesh import SINGLE, Axis, Mesh, build_mesh


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
    real, sharded_relation.Exchange = sharded_relation.Exchange, NoExchange
    try:
        by_schedule(x, plan)
    finally:
        sharded_relation.Exchange = real


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


def seconds(function, x: Operand, plan: RelationPlan, repeats: int) -> float:
    """Median over repeats of the slowest rank's time."""
    times = []
    for _ in range(repeats + 1):
        synchronize(x.student.device, plan.axis)
        start = time.perf_counter()
        function(x, plan)
        synchronize(x.student.device, SINGLE)
        own = torch.tensor([time.perf_counter() - start], device=x.student.device)
        times.append(float(all_gather_tokens(own, plan.axis).max()))
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
        found[function.__name__] = seconds(function, x, plan, options.repeats)
    return found


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
    options = parser.parse_args()
    mesh = build_mesh(options.device, 1)
    sizes = [2**k for k in range(mesh.world.size.bit_length()) if 2**k <= mesh.world.size]
    groups = {size: dist.new_group(list(range(size))) if size > 1 else None for size in sizes}
    results = []
    for length in options.lengths:
        for size in sizes:
            if mesh.world.rank < size:
                axis = SINGLE if size == 1 else Axis(groups[size], mesh.world.rank, size)
                results.append(measure(mesh, axis, length, options))
            synchronize(mesh.device, mesh.world)
    if mesh.world.rank == 0:
        report(results)
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


if __name__ == "__main__":
    main()
