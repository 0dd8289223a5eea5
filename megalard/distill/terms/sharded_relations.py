"""Relation KL over a sharded sequence: schedule, exchange, partial statistics, gradients.

Each rank computes the tasks of its schedule: those of its own chunk at once, and the others as the
chunks that they need arrive. The columns of a row are then spread over ranks, so the partial
statistics of the rows are all-reduced: first the maxima, then the rescaled sums. Now every rank has
the exact log-sum-exps and computes the gradients of its tasks. The gradients of fetched chunks are
sent back to the owners of the chunks.

With one rank the schedule is a single task, and nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalard.config.objective import RELATIONS
from megalard.kernels.relation_kl import (
    IntervalMask,
    Partials,
    RelationStatistics,
    finish,
    merge,
    places_mask,
    relation_backward,
    relation_forward,
    relation_partials,
    rescale,
)
from megalard.parallel.collectives import all_reduce
from megalard.parallel.context.exchange import Exchange
from megalard.parallel.context.schedule import Part, Round, Task, schedule
from megalard.parallel.context.shard import SequenceShard
from megalard.transfer import to_device


@dataclass(frozen=True)
class Operand:
    """The student's and the teacher's vectors of one kind, [b, h, s / P, d] each."""

    student: torch.Tensor
    teacher: torch.Tensor

    def rows(self, part: slice) -> Operand:
        """Return the vectors of some tokens."""
        return Operand(self.student[:, :, part], self.teacher[:, :, part])


Chunk = dict[str, Operand]
"""The operands of one chunk, by kind."""


@dataclass
class Traffic:
    """The bytes that this rank gave to the network.

    Attributes:
        chunks: operands of this rank's chunk.
        gradients: gradients of fetched chunks.
        reduced: row statistics that were handed to all-reduce, of which a ring sends 2 (P - 1) / P.
    """

    chunks: int = 0
    gradients: int = 0
    reduced: int = 0


class RelationPlan:
    """The tasks and masks of the blocks of one micro-batch, which all layers share.

    Attributes:
        rounds: this rank's schedule.
        traffic: what was sent since the plan was made.

    Args:
        shard: this rank's share of the blocks.
        doc_start_bs, doc_end_bs: int32 [b, length], the document interval of every token of the
            whole blocks; empty for padding.
    """

    def __init__(self, shard: SequenceShard, doc_start_bs: torch.Tensor, doc_end_bs: torch.Tensor):
        self.shard, self.axis, self.traffic = shard, shard.axis, Traffic()
        self.rounds: tuple[Round, ...] = schedule(self.axis.size, self.axis.rank)
        self.local_chunk: Part = self.rounds[0].tasks[0].rows
        self._masks = {
            task: self._make_mask(task, doc_start_bs, doc_end_bs)
            for round_ in self.rounds
            for task in round_.tasks
        }

    def tokens(self, part: Part) -> slice:
        """Return the tokens of a part, counted within its chunk."""
        size = self.shard.piece_length
        start, end = part.start * size, part.end * size
        middle = start + (end - start + 1) // 2
        return {None: slice(start, end), 0: slice(start, middle), 1: slice(middle, end)}[part.half]

    def global_rows(self, part: Part) -> slice:
        """Return the tokens of a part, counted over all chunks in the order of the ranks."""
        tokens, offset = self.tokens(part), part.chunk * self.shard.local_length
        return slice(offset + tokens.start, offset + tokens.stop)

    def mask(self, task: Task) -> IntervalMask:
        """Return which rows of a task see which columns."""
        return self._masks[task]

    def _make_mask(self, task: Task, doc_start_bs, doc_end_bs) -> IntervalMask:
        rows, columns = (
            self.shard.positions_of(part.chunk)[self.tokens(part)]
            for part in (task.rows, task.columns)
        )
        common = min(len(rows), len(columns))
        aligned = torch.equal(rows[:common], columns[:common])
        rows, columns = (to_device(x, doc_start_bs.device) for x in (rows, columns))
        return places_mask(doc_start_bs, doc_end_bs, rows, columns, aligned=aligned)


def relation_sums(
    operands: Chunk, weights: dict[str, float], plan: RelationPlan, with_grad: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sum the KL of this rank's rows and heads for each relation, and compute the gradients.

    Args:
        operands: this rank's q, k and v, as far as the relations read them.
        weights: relation name to the factor that its sum has in the loss.
        with_grad: whether gradients are needed.

    Returns:
        Relation name to Σ KL_i, a scalar in fp32. Operand name to the gradient of Σ weight * sum
        with respect to the student's vectors of this rank's chunk, in their dtype; empty without
        ``with_grad``.
    """
    if plan.axis.size == 1:
        return _single_rank(operands, weights, plan, with_grad)

    kinds = list(operands)
    chunks: dict[int, Chunk] = {}
    partials = {
        name: _empty_partials(operands[RELATIONS[name].rows].student, plan.shard)
        for name in weights
    }
    for round_, chunk in _arriving_chunks(operands, plan):
        chunks[round_.chunk] = chunk
        for task in round_.tasks:
            for name in weights:
                rows, columns = _task_operands(name, task, chunks, plan)
                task_partials = relation_partials(
                    rows.student, rows.teacher, *_columns(rows, columns), mask=plan.mask(task)
                )
                merged = Partials(*(x[:, :, plan.global_rows(task.rows)] for x in partials[name]))
                for x, value in zip(merged, merge(merged, task_partials), strict=True):
                    x.copy_(value)

    statistics = {name: _reduce_rows(partials[name], plan) for name in weights}
    local_rows = plan.global_rows(plan.local_chunk)
    sums = {name: rows.kl[:, :, local_rows].sum() for name, rows in statistics.items()}
    if not with_grad:
        return sums, {}
    return sums, _gradients(chunks, kinds, weights, statistics, plan)


def _single_rank(
    operands: Chunk, weights: dict[str, float], plan: RelationPlan, with_grad: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Compute ``relation_sums`` without context parallelism: one task and no exchange."""
    (task,) = plan.rounds[0].tasks
    mask, sums, grads = plan.mask(task), {}, {}
    uses = [kind for name in weights for kind in RELATIONS[name].operands]
    for name, weight in weights.items():
        relation = RELATIONS[name]
        rows, columns = operands[relation.rows], operands[relation.columns]
        column_tensors = _columns(rows, columns)
        rows_statistics = relation_forward(rows.student, rows.teacher, *column_tensors, mask=mask)
        sums[name] = rows_statistics.kl.sum()
        if not with_grad:
            continue
        # The gradients of an operand that several relations read are added up in fp32.
        dtype = torch.float32 if len(uses) > len(operands) else rows.student.dtype
        factor = rows_statistics.lse_s.new_full((1, 1, 1), weight)
        result = relation_backward(
            rows.student, rows.teacher, *column_tensors, rows_statistics.lse_s,
            rows_statistics.lse_t, factor, mask=mask, out_dtype=dtype,
        )  # fmt: skip
        for kind, grad in zip(relation.operands, _as_tuple(result), strict=True):
            grads[kind] = grads[kind] + grad if kind in grads else grad
    return sums, {kind: grad.to(operands[kind].student.dtype) for kind, grad in grads.items()}


def _arriving_chunks(operands: Chunk, plan: RelationPlan) -> Iterator[tuple[Round, Chunk]]:
    """Yield each round with its chunk. All transfers are started before the first round."""
    local = [x for operand in operands.values() for x in (operand.student, operand.teacher)]
    local = [x.detach().contiguous() for x in local]
    exchanges = [
        None
        if round_.recipient is None
        else Exchange(local, round_.recipient, round_.chunk, plan.axis)
        for round_ in plan.rounds
    ]
    plan.traffic.chunks += sum(exchange.sent_bytes for exchange in exchanges if exchange)
    for round_, exchange in zip(plan.rounds, exchanges, strict=True):
        tensors = local if exchange is None else exchange.wait()
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        yield round_, {kind: Operand(*pair) for kind, pair in zip(operands, pairs, strict=True)}


def _task_operands(
    name: str, task: Task, chunks: dict[int, Chunk], plan: RelationPlan
) -> tuple[Operand, Operand]:
    """Return the rows and the columns of a task; the same object where a part meets itself."""
    relation = RELATIONS[name]
    rows = chunks[task.rows.chunk][relation.rows].rows(plan.tokens(task.rows))
    if task.rows == task.columns and relation.rows == relation.columns:
        return rows, rows
    columns = chunks[task.columns.chunk][relation.columns].rows(plan.tokens(task.columns))
    return rows, columns


def _columns(rows: Operand, columns: Operand) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the column tensors as the kernels take them: None where columns are the rows."""
    return (None, None) if rows is columns else (columns.student, columns.teacher)


def _as_tuple(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (result,) if torch.is_tensor(result) else result


def _empty_partials(local: torch.Tensor, shard: SequenceShard) -> Partials:
    """Return the partials of all rows of the blocks, chunk after chunk, over no column."""
    shape = (5, *local.shape[:2], shard.length)
    partials = Partials(*local.new_zeros(shape, dtype=torch.float32))
    for x in (partials.m_s, partials.m_t):
        x.fill_(float("-inf"))
    return partials


def _reduce_rows(local: Partials, plan: RelationPlan) -> RelationStatistics:
    """Return the statistics of all rows of the blocks, exact and the same on every rank."""
    maxima = all_reduce(torch.stack((local.m_s, local.m_t)), plan.axis, dist.ReduceOp.MAX)
    local = rescale(local, maxima[0], maxima[1])
    sums = all_reduce(torch.stack((local.l_s, local.l_t, local.a)), plan.axis)
    plan.traffic.reduced += (maxima.numel() + sums.numel()) * maxima.element_size()
    return finish(Partials(maxima[0], sums[0], maxima[1], sums[1], sums[2]))


def _gradients(
    chunks: dict[int, Chunk],
    kinds: list[str],
    weights: dict[str, float],
    statistics: dict[str, RelationStatistics],
    plan: RelationPlan,
) -> dict[str, torch.Tensor]:
    """Return the gradients of this rank's chunk, from its own tasks and from other ranks' tasks."""
    grads: dict[int, dict[str, torch.Tensor]] = {chunk: {} for chunk in chunks}

    def add(part: Part, kind: str, grad: torch.Tensor) -> None:
        chunk_tensor = chunks[part.chunk][kind].student
        if kind not in grads[part.chunk]:
            if grad.shape == chunk_tensor.shape:
                grads[part.chunk][kind] = grad
                return
            grads[part.chunk][kind] = torch.zeros_like(chunk_tensor, dtype=torch.float32)
        grads[part.chunk][kind][:, :, plan.tokens(part)] += grad

    for task in (task for round_ in plan.rounds for task in round_.tasks):
        for name, weight in weights.items():
            rows, columns = _task_operands(name, task, chunks, plan)
            lse_s, lse_t = (x[:, :, plan.global_rows(task.rows)] for x in statistics[name][:2])
            result = relation_backward(
                rows.student, rows.teacher, *_columns(rows, columns), lse_s, lse_t,
                lse_s.new_full((1, 1, 1), weight), mask=plan.mask(task), out_dtype=torch.float32,
            )  # fmt: skip
            relation = RELATIONS[name]
            targets = ((task.rows, relation.rows), (task.columns, relation.columns))
            # A part that meets itself has one gradient, which belongs to both of its roles.
            for (part, kind), grad in zip(targets, _as_tuple(result), strict=False):
                add(part, kind, grad)
    return _return_to_owners(grads, kinds, chunks, plan)


def _return_to_owners(
    grads: dict[int, dict[str, torch.Tensor]],
    kinds: list[str],
    chunks: dict[int, Chunk],
    plan: RelationPlan,
) -> dict[str, torch.Tensor]:
    """Send the gradients of fetched chunks to their owners, and add up those that arrive."""
    local_chunk = plan.axis.rank
    dtypes = {kind: chunks[local_chunk][kind].student.dtype for kind in kinds}
    exchanges = [
        # The reverse of the exchange of chunks: to the owner of the chunk, and from the rank that
        # received this rank's chunk.
        Exchange(
            [grads[round_.chunk][kind].to(dtypes[kind]) for kind in kinds],
            round_.chunk,
            round_.recipient,
            plan.axis,
        )
        for round_ in plan.rounds
        if round_.recipient is not None
    ]
    plan.traffic.gradients += sum(exchange.sent_bytes for exchange in exchanges)
    total = grads[local_chunk]
    for exchange in exchanges:
        for kind, grad in zip(kinds, exchange.wait(), strict=True):
            total[kind] += grad
    return {kind: total[kind].to(dtypes[kind]) for kind in kinds}
