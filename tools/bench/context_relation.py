"""One relation over a sharded sequence: by the trainer's schedule, and by gathering all rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch

from megalard.data.batch import collate
from megalard.distill.terms import sharded_relations
from megalard.distill.terms.sharded_relations import Operand, RelationPlan, relation_sums
from megalard.kernels.relation_kl import (
    IntervalMask,
    chunk_mask,
    relation_backward,
    relation_forward,
)
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import Axis
from tools.bench.agreement import check_agreement
from tools.bench.results import Table
from tools.bench.timing import slowest_rank_seconds


@dataclass(frozen=True)
class Relation:
    """The self relation of one operand, of which every rank has a chunk.

    Attributes:
        chunk: this rank's vectors of student and teacher.
        plan: the trainer's schedule and masks.
        masks: piece of this rank to the mask between it and everything up to its end.
    """

    chunk: Operand
    plan: RelationPlan
    masks: dict[int, IntervalMask]


def make_relation(
    length: int, heads: int, head_dim: int, axis: Axis, device: torch.device, dtype: torch.dtype
) -> Relation:
    """Return the relation of random vectors of a block that is one document."""
    shard = SequenceShard(length, axis)
    tokens = torch.zeros(length, dtype=torch.int64).numpy()
    batch = collate([(tokens, [(0, length)])]).to(device)
    documents, size = (batch.doc_start_bn, batch.doc_end_bn), shard.piece_length
    masks = {
        piece: chunk_mask(
            *documents, row_offset=piece * size, n=size, col_offset=0, m=(piece + 1) * size
        )
        for piece in shard.local_pieces
    }
    shape = (1, heads, shard.local_length, head_dim)
    chunk = Operand(*(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)))
    return Relation(chunk, RelationPlan(shard, *documents), masks)


def by_schedule(relation: Relation) -> list[torch.Tensor]:
    """Return the sum of the KL of this rank's rows, and the gradient of its chunk."""
    sums, gradients = relation_sums({"q": relation.chunk}, {"q": 1.0}, relation.plan, True)
    return [sums["q"], gradients["q"]]


def by_schedule_without_transfers(relation: Relation) -> list[torch.Tensor]:
    """Do the same work; the row statistics, which are small, are still reduced."""
    with mock.patch.object(sharded_relations, "Exchange", NoExchange):
        return by_schedule(relation)


class NoExchange:
    """A stand-in for ``Exchange`` that at once receives the tensors that it was given to send."""

    sent_bytes = 0

    def __init__(self, tensors: list[torch.Tensor], recipient: int, source: int, axis: Axis):
        self._tensors = tensors

    def wait(self) -> list[torch.Tensor]:
        return self._tensors


def by_all_gather(relation: Relation) -> list[torch.Tensor]:
    """Return the same sum and gradient as ``by_schedule``.

    Every rank gathers all vectors, computes the rows of its pieces, and reduce-scatters the
    gradients of all vectors.
    """
    shard = relation.plan.shard
    size = shard.piece_length
    local = relation.chunk.student.detach().requires_grad_()
    block = Operand(shard.gather(local), shard.gather(relation.chunk.teacher))
    detached = Operand(block.student.detach(), block.teacher)
    gradient = torch.zeros_like(detached.student, dtype=torch.float32)
    total = gradient.new_zeros(())
    for piece in shard.local_pieces:
        row_slice, column_slice = (
            slice(piece * size, (piece + 1) * size),
            slice(0, (piece + 1) * size),
        )
        rows, columns = detached.rows(row_slice), detached.rows(column_slice)
        vectors = (rows.student, rows.teacher, columns.student, columns.teacher)
        mask = relation.masks[piece]
        statistics = relation_forward(*vectors, mask=mask)
        row_gradient, column_gradient = relation_backward(
            *vectors, statistics.lse_s, statistics.lse_t, mask=mask, out_dtype=torch.float32
        )
        gradient[:, :, row_slice] += row_gradient
        gradient[:, :, column_slice] += column_gradient
        total = total + statistics.kl.sum()
    # The backward pass of the gather sums the gradients over ranks and scatters them.
    return [total, *torch.autograd.grad(block.student, local, gradient.to(local.dtype))]


def measure(
    options: argparse.Namespace, length: int, axis: Axis, device: torch.device
) -> dict[str, float]:
    """Compare and time all three ways; a collective call over the axis."""
    relation = make_relation(
        length, options.heads, options.head_dim, axis, device, getattr(torch, options.dtype)
    )
    check_agreement(by_schedule(relation), by_all_gather(relation), "gathering", axis)
    result: dict[str, float] = {"tokens": length, "ranks": axis.size}

    def seconds(work: Callable[[Relation], object]) -> float:
        return slowest_rank_seconds(lambda: work(relation), axis, device, options.repeats)

    for work in (by_schedule, by_schedule_without_transfers, by_all_gather):
        result[f"{work.__name__}_seconds"] = seconds(work)
    return result


class Report:
    """A table of the results, which rank 0 prints as they come."""

    def __init__(self, is_rank_0: bool):
        self._one_rank: dict[int, float] = {}
        self._table = None
        if is_rank_0:
            print("one relation, forward and gradient; gain: speed relative to the schedule's on")
            print("one rank\n")
            self._table = Table(
                "tokens", "ranks", "schedule, ms", "gain", "not hidden", "all-gather, ms", "gain"
            )

    def add(self, result: dict) -> None:
        """Print one result; the result of one rank comes first for each length."""
        if self._table is None:
            return
        schedule, gathered = result["by_schedule_seconds"], result["by_all_gather_seconds"]
        one_rank = self._one_rank.setdefault(result["tokens"], schedule)
        exposed = max(0.0, 1 - result["by_schedule_without_transfers_seconds"] / schedule)
        self._table.row(
            f"{result['tokens']:,}",
            result["ranks"],
            f"{schedule * 1e3:.2f}",
            f"{one_rank / schedule:.2f}",
            f"{exposed:.1%}",
            f"{gathered * 1e3:.2f}",
            f"{one_rank / gathered:.2f}",
        )
