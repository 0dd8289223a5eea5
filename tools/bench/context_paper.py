"""``bench_context.py --paper``: bytes a rank sends in a layer, by formula and by counters."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megalard.data.batch import collate
from megalard.distill.terms.sharded_relations import (
    Operand,
    RelationPlan,
    Traffic,
    expected_traffic,
    relation_sums,
)
from megalard.parallel.context.schedule import difference_cover
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import Axis, build_mesh

# LLaMA2-7B: features a token of q, k and v each, and heads; bf16 between ranks
WIDTH, HEADS, BYTES = 4096, 32, 2
RELATIONS, NETWORK_BYTES_PER_S = 3, 50e9
COUNTED = range(2, 9)
RANKS = (2, 4, 8, 16, 32, 64)


def relation_bytes(ranks: int, length: int) -> tuple[float, float]:
    """What a rank sends for the relations: by the difference cover, and under an all-gather.

    An all-reduce sends 2 (P - 1) / P of what it is handed. The all-gather needs none, since every
    rank then sees whole rows, but gathers both models' chunks and reduce-scatters the gradients.
    """
    chunk = RELATIONS * WIDTH * BYTES * length // ranks
    found = expected_traffic(ranks, chunk, RELATIONS * HEADS * 4 * length)
    ours = found.chunks + found.gradients + found.reduced * 2 * (ranks - 1) / ranks
    return ours, 3 * (ranks - 1) * chunk


def attention_bytes(ranks: int, length: int) -> tuple[float, float]:
    """What a rank sends for attention: gathering K and V, and passing them round a ring.

    Both move K and V of teacher and student forward, and once more for the student where the layer
    is recomputed. Backward, gathering reduce-scatters their gradients; a ring moves K and V again
    and the gradients, in fp32, one hop further than them.
    """
    chunk = 2 * WIDTH * BYTES * length // ranks
    hops = ranks - 1
    return (3 * hops + hops) * chunk, (3 * hops + hops + 2 * ranks) * chunk


def print_paper(length: int) -> None:
    """Both tables for LLaMA2-7B, after the counters were compared with the formula."""
    for ranks, same in sorted(count().items()):
        assert same, f"the counters of {ranks} ranks are not what the formula says"
    print(f"counters of {COUNTED[0]} to {COUNTED[-1]} ranks: what the formula says, on every rank")
    print(f"LLaMA2-7B, {length} tokens, bf16: GiB a rank sends in a layer, and ms at 50 GB/s")
    print("ranks  |A|-1  P-1   relations: cover      all-gather   attention: gather        ring")
    for ranks in RANKS:
        numbers = (*relation_bytes(ranks, length), *attention_bytes(ranks, length))
        cells = [f"{n / 2**30:5.2f} {n / NETWORK_BYTES_PER_S * 1e3:5.0f} ms" for n in numbers]
        fetches = len(difference_cover(ranks)) - 1
        print(f"{ranks:5d} {fetches:6d} {ranks - 1:4d}      " + "     ".join(cells))


def count() -> dict[int, bool]:
    """Whether every rank's counters are the formula's, for each number of ranks in ``COUNTED``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    multiprocessing.spawn(_rank, (port, results), nprocs=max(COUNTED))
    return results.get()


def _rank(rank: int, port: int, results) -> None:
    world = max(COUNTED)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    mesh, same = build_mesh("cpu", 1), {}
    for ranks in COUNTED:
        group = dist.new_group(list(range(ranks)))
        if rank < ranks:
            traffic, expected = _counted(Axis(group, rank, ranks))
            found = [None] * ranks
            dist.all_gather_object(found, traffic == expected, group=group)
            same[ranks] = all(found)
    if mesh.world.rank == 0:
        results.put(same)
    dist.barrier()
    dist.destroy_process_group()


def _counted(axis: Axis) -> tuple[Traffic, Traffic]:
    """A small relation step's counters, and the formula's figures for it."""
    heads, width, length = 2, 8, 16 * axis.size
    shard = SequenceShard(length, axis)
    batch = collate([(torch.zeros(length, dtype=torch.int64).numpy(), [(0, length)])])
    plan = RelationPlan(shard, batch.doc_start_bn, batch.doc_end_bn)
    x = torch.randn(2, 1, heads, shard.own_length, width)
    names = ("q", "k", "v")
    relation_sums({n: Operand(*x) for n in names}, dict.fromkeys(names, 1.0), plan, True)
    chunk = 3 * heads * width * shard.own_length * 4
    return plan.traffic, expected_traffic(axis.size, chunk, 3 * heads * length * 4)
