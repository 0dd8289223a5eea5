"""The bytes that a rank sends per layer, by formula and by the trainer's counters."""

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
    relation_sums,
)
from megalard.parallel.context.schedule import difference_cover
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import Axis, build_mesh
from tools.bench.results import Table
from tools.bench.traffic import expected_traffic

# LLaMA2-7B: features per token of each of q, k and v, and heads; bf16 between ranks.
_FEATURES, _HEADS, _BYTES = 4096, 32, 2
_RELATIONS = ("q", "k", "v")
# One 400 Gb/s card per GPU.
_NETWORK_BYTES_PER_S = 50e9
_RANKS = (2, 4, 8, 16, 32, 64)
COUNTED_RANKS = range(2, 9)


def relation_bytes(ranks: int, length: int) -> tuple[float, float]:
    """Return the bytes that a rank sends for the relations: by the schedule, and by gathering.

    An all-reduce by a ring sends 2 (P - 1) / P of its bytes. Gathering needs no all-reduce, because
    every rank then sees whole rows, but it gathers the chunks of both models and reduce-scatters
    the gradients.
    """
    chunk = len(_RELATIONS) * _FEATURES * _BYTES * length // ranks
    traffic = expected_traffic(ranks, chunk, len(_RELATIONS) * _HEADS * 4 * length)
    reduced = traffic.reduced * 2 * (ranks - 1) / ranks
    return traffic.chunks + traffic.gradients + reduced, 3 * (ranks - 1) * chunk


def attention_bytes(ranks: int, length: int) -> tuple[float, float]:
    """Return the bytes that a rank sends for attention: by gathering K and V, and by a ring.

    Both move K and V of teacher and student forward, and the student's once more under activation
    checkpointing. In the backward pass gathering reduce-scatters their gradients. A ring moves K
    and V again, and moves their gradients, in fp32, one hop further.
    """
    chunk = 2 * _FEATURES * _BYTES * length // ranks
    hops = ranks - 1
    return 4 * hops * chunk, (4 * hops + 2 * ranks) * chunk


def report(length: int) -> list[dict]:
    """Compare the counters with the formula, then print and return the bytes for LLaMA2-7B."""
    for ranks, pairs in count().items():
        for rank, (counted, expected) in enumerate(pairs):
            assert counted == expected, (
                f"rank {rank} of {ranks} sent {counted}, and the formula says {expected}"
            )
    print(
        f"on {COUNTED_RANKS[0]} to {COUNTED_RANKS[-1]} ranks, the counters of every rank equal the "
        "formula\n\n"
        f"LLaMA2-7B, {length:,} tokens, bf16: GiB that a rank sends per layer, and ms at 50 GB/s;\n"
        "chunks: the chunks that a rank fetches by the schedule, of those fetched by gathering\n"
    )
    names = ("relations_schedule", "relations_gathering", "attention_gathering", "attention_ring")
    table = Table("ranks", "chunks", *((name.replace("_", ", "), 16) for name in names))
    results = []
    for ranks in _RANKS:
        numbers = (*relation_bytes(ranks, length), *attention_bytes(ranks, length))
        fetches = len(difference_cover(ranks)) - 1
        result = dict(zip((f"{name}_bytes" for name in names), numbers, strict=True))
        results.append({"ranks": ranks, "tokens": length, "chunks_fetched": fetches, **result})
        cells = (f"{n / 2**30:.2f} {n / _NETWORK_BYTES_PER_S * 1e3:5.0f} ms" for n in numbers)
        table.row(ranks, f"{fetches} of {ranks - 1}", *cells)
    return results


def count() -> dict[int, list[tuple[Traffic, Traffic]]]:
    """Return the counters of every rank and the results of the formula, by number of ranks.

    The ranks are processes on this machine. They are forked from a server that has imported torch,
    so that each of them need not import it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    results = context.SimpleQueue()
    multiprocessing.start_processes(
        _run_rank, (_free_port(), results), nprocs=COUNTED_RANKS[-1], start_method="forkserver"
    )
    return results.get()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_rank(rank: int, port: int, results) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": COUNTED_RANKS[-1]}
    numbers["MASTER_PORT"] = port
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    mesh, pairs = build_mesh("cpu", 1), {}
    for ranks in COUNTED_RANKS:
        group = dist.new_group(list(range(ranks)))
        if rank < ranks:
            pairs[ranks] = [None] * ranks
            pair = count_small_step(Axis(group, rank, ranks))
            dist.all_gather_object(pairs[ranks], pair, group=group)
    if mesh.is_rank_0:
        results.put(pairs)
    dist.barrier()
    dist.destroy_process_group()


def count_small_step(axis: Axis) -> tuple[Traffic, Traffic]:
    """Return the counters of a small step of the relations, and the result of the formula."""
    heads, head_dim, length = 2, 8, 16 * axis.size
    shard = SequenceShard(length, axis)
    tokens = torch.zeros(length, dtype=torch.int64).numpy()
    batch = collate([(tokens, [(0, length)])])
    plan = RelationPlan(shard, batch.doc_start_bn, batch.doc_end_bn)
    chunk = Operand(*torch.randn(2, 1, heads, shard.local_length, head_dim))
    operands = {name: chunk for name in _RELATIONS}
    relation_sums(operands, dict.fromkeys(_RELATIONS, 1.0), plan, True)
    chunk_bytes = len(_RELATIONS) * chunk.student.numel() * 4
    row_bytes = len(_RELATIONS) * heads * length * 4
    return plan.traffic, expected_traffic(axis.size, chunk_bytes, row_bytes)
