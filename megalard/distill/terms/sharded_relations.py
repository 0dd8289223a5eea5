"""Relation KL over a sharded sequence: schedule, exchange, partial statistics, gradients.

Each rank computes the pairs of pieces its schedule gives it, on its own chunk at once and on each
fetched chunk as it arrives. Rows are then spread over ranks: their partial statistics are
all-reduced (maxima, then rescaled sums), after which every rank has the exact log-sum-exps and
computes the gradients of its pairs; those of fetched chunks go back to their owners.

With one rank the schedule is a single task and nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

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
from megalard.parallel.context.schedule import Part, Stage, Task, difference_cover, schedule
from megalard.parallel.context.shard import Exchange, SequenceShard

OPERANDS = {"q": ("q", "q"), "k": ("k", "k"), "v": ("v", "v"), "qk": ("q", "k")}


@dataclass(frozen=True)
class Operand:
    """Student's and teacher's vectors of one kind, [b, h, s / P, d] each."""

    student: torch.Tensor
    teacher: torch.Tensor

    def rows(self, part: slice) -> Operand:
        return Operand(self.student[:, :, part], self.teacher[:, :, part])


@dataclass
class Traffic:
    """Bytes this rank gave to the network: chunks, their gradients, and row statistics.

    ``reduced`` counts what is handed to all-reduce, of which a ring sends 2 (P - 1) / P.
    """

    chunks: int = 0
    gradients: int = 0
    reduced: int = 0


def expected_traffic(ranks: int, chunk_bytes: int, row_bytes: int) -> Traffic:
    """The same by formula, for one layer of models of one width.

    Args:
        chunk_bytes: of the student's own chunk, over all operands.
        row_bytes: of one fp32 number for every row of the whole blocks and every head, summed over
            the relations.
    """
    if ranks == 1:
        return Traffic()
    fetches = len(difference_cover(ranks)) - 1
    return Traffic(2 * fetches * chunk_bytes, fetches * chunk_bytes, 5 * row_bytes)


class RelationPlan:
    """Tasks and masks of the blocks of one micro-batch, shared by all layers.

    ``traffic`` counts what was sent since the plan was made.

    Args:
        shard: this rank's share of the sequence.
        doc_start_bs, doc_end_bs: int32 [b, length], the document interval of every token of the
            whole blocks; empty for padding.
    """

    def __init__(self, shard: SequenceShard, doc_start_bs: torch.Tensor, doc_end_bs: torch.Tensor):
        self.shard, self.axis, self.traffic = shard, shard.axis, Traffic()
        self.stages: tuple[Stage, ...] = schedule(self.axis.size, self.axis.rank)
        self.own: Part = self.stages[0].tasks[0].rows
        self._masks = {
            task: self._mask(task, doc_start_bs, doc_end_bs)
            for stage in self.stages
            for task in stage.tasks
        }

    def tokens(self, part: Part) -> slice:
        """The part's tokens within their chunk."""
        size = self.shard.piece_length
        start, end = part.first * size, part.last * size
        middle = start + (end - start + 1) // 2
        return {None: slice(start, end), 0: slice(start, middle), 1: slice(middle, end)}[part.half]

    def rows_of(self, part: Part) -> slice:
        """The part's tokens among those of all chunks, chunk after chunk."""
        tokens, start = self.tokens(part), part.chunk * self.shard.own_length
        return slice(start + tokens.start, start + tokens.stop)

    def mask(self, task: Task) -> IntervalMask:
        return self._masks[task]

    def _mask(self, task: Task, doc_start_bs, doc_end_bs) -> IntervalMask:
        rows, columns = (
            self.shard.positions_of(part.chunk)[self.tokens(part)]
            for part in (task.rows, task.columns)
        )
        return places_mask(doc_start_bs, doc_end_bs, rows, columns)


def relation_sums(
    operands: dict[str, Operand], weights: dict[str, float], plan: RelationPlan, with_grad: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Σ KL_i over this rank's own rows and heads for each relation, and the weighted gradients.

    Args:
        operands: "q", "k", "v" as the relations need them.
        weights: relation name to the factor its sum has in the loss.

    Returns:
        relation name to a fp32 scalar, and operand name to the gradient of Σ weight * sum with
        respect to the student's own chunk, in the student's dtype ({} without ``with_grad``).
    """
    names = list(operands)
    if plan.axis.size == 1:
        return _alone(operands, weights, plan, with_grad)

    chunks: dict[int, dict[str, Operand]] = {}
    partials = {
        name: _no_partials(operands[OPERANDS[name][0]].student, plan.shard) for name in weights
    }
    for stage, exchanged in _arrivals(operands, names, plan):
        chunks[stage.chunk] = exchanged
        for task in stage.tasks:
            for name in weights:
                rows, columns = _task_operands(name, task, chunks, plan)
                found = relation_partials(
                    rows.student, rows.teacher, *_other(rows, columns), mask=plan.mask(task)
                )
                known = Partials(*(x[:, :, plan.rows_of(task.rows)] for x in partials[name]))
                for x, value in zip(known, merge(known, found), strict=True):
                    x.copy_(value)

    statistics = {name: _reduce_rows(partials[name], plan) for name in weights}
    own = plan.rows_of(plan.own)
    sums = {name: found.kl[:, :, own].sum() for name, found in statistics.items()}
    if not with_grad:
        return sums, {}
    return sums, _gradients(chunks, names, weights, statistics, plan)


def _alone(operands, weights, plan, with_grad):
    (task,) = plan.stages[0].tasks
    mask, sums, grads = plan.mask(task), {}, {}
    shared = sum(name in OPERANDS[r] for r in weights for name in set(OPERANDS[r])) > len(operands)
    for name, weight in weights.items():
        rows, columns = (operands[kind] for kind in OPERANDS[name])
        other = _other(rows, columns)
        found = relation_forward(rows.student, rows.teacher, *other, mask=mask)
        sums[name] = found.kl.sum()
        if not with_grad:
            continue
        # an operand of two relations sums their gradients in fp32
        dtype = torch.float32 if shared else rows.student.dtype
        factor = found.lse_s.new_full((1, 1, 1), weight)
        parts = relation_backward(
            rows.student, rows.teacher, *other, found.lse_s, found.lse_t, factor,
            mask=mask, out_dtype=dtype,
        )  # fmt: skip
        for kind, part in zip(OPERANDS[name], parts if rows is not columns else (parts,)):  # noqa: B905
            grads[kind] = grads[kind] + part if kind in grads else part
    return sums, {kind: grad.to(operands[kind].student.dtype) for kind, grad in grads.items()}


def _arrivals(operands, names, plan) -> Iterator[tuple[Stage, dict[str, Operand]]]:
    """Each stage with its chunk's operands; all transfers are posted before the first work."""
    own = [x for name in names for x in (operands[name].student, operands[name].teacher)]
    own = [x.detach().contiguous() for x in own]
    exchanges = [
        None if stage.to is None else Exchange(own, stage.to, stage.chunk, plan.axis)
        for stage in plan.stages
    ]
    plan.traffic.chunks += sum(exchange.sent_bytes for exchange in exchanges if exchange)
    for stage, exchange in zip(plan.stages, exchanges, strict=True):
        tensors = own if exchange is None else exchange.wait()
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        yield stage, {name: Operand(*pair) for name, pair in zip(names, pairs, strict=True)}


def _task_operands(name, task, chunks, plan) -> tuple[Operand, Operand]:
    """Rows and columns; the same object where a part meets itself."""
    rows, columns = (
        chunks[part.chunk][kind].rows(plan.tokens(part))
        for part, kind in zip((task.rows, task.columns), OPERANDS[name], strict=True)
    )
    return rows, rows if task.rows == task.columns and len(set(OPERANDS[name])) == 1 else columns


def _other(rows: Operand, columns: Operand) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The columns' vectors as the kernels take them: None for the self relation."""
    return (None, None) if rows is columns else (columns.student, columns.teacher)


def _no_partials(own: torch.Tensor, shard: SequenceShard) -> Partials:
    """Those of all rows of the blocks, chunk after chunk, before any column is seen."""
    shape = (5, *own.shape[:2], shard.length)
    empty = Partials(*own.new_zeros(shape, dtype=torch.float32))
    for x in (empty.m_s, empty.m_t):
        x.fill_(float("-inf"))
    return empty


def _reduce_rows(local: Partials, plan: RelationPlan) -> RelationStatistics:
    """Statistics of all rows of the blocks, exact and the same on every rank."""
    maxima = all_reduce(torch.stack((local.m_s, local.m_t)), plan.axis, dist.ReduceOp.MAX)
    local = rescale(local, maxima[0], maxima[1])
    sums = all_reduce(torch.stack((local.l_s, local.l_t, local.a)), plan.axis)
    plan.traffic.reduced += (maxima.numel() + sums.numel()) * maxima.element_size()
    return finish(Partials(maxima[0], sums[0], maxima[1], sums[1], sums[2]))


def _gradients(chunks, names, weights, statistics, plan) -> dict[str, torch.Tensor]:
    """Gradients of the own chunk: this rank's pairs, and what the others computed for it."""
    grads: dict[int, dict[str, torch.Tensor]] = {chunk: {} for chunk in chunks}

    def add(part: Part, kind: str, found: torch.Tensor) -> None:
        whole = chunks[part.chunk][kind].student
        if kind not in grads[part.chunk]:
            if found.shape == whole.shape:
                grads[part.chunk][kind] = found
                return
            grads[part.chunk][kind] = torch.zeros_like(whole, dtype=torch.float32)
        grads[part.chunk][kind][:, :, plan.tokens(part)] += found

    for task in (task for stage in plan.stages for task in stage.tasks):
        for name, weight in weights.items():
            rows, columns = _task_operands(name, task, chunks, plan)
            lse_s, lse_t = (x[:, :, plan.rows_of(task.rows)] for x in statistics[name][:2])
            found = relation_backward(
                rows.student, rows.teacher, *_other(rows, columns), lse_s, lse_t,
                lse_s.new_full((1, 1, 1), weight), mask=plan.mask(task), out_dtype=torch.float32,
            )  # fmt: skip
            if rows is columns:
                add(task.rows, OPERANDS[name][0], found)
            else:
                for part, kind, x in zip((task.rows, task.columns), OPERANDS[name], found):  # noqa: B905
                    add(part, kind, x)
    return _return_to_owners(grads, names, chunks, plan)


def _return_to_owners(grads, names, chunks, plan) -> dict[str, torch.Tensor]:
    """Send each fetched chunk's gradients back, and add up what comes for the own chunk."""
    own_chunk = plan.axis.rank
    dtypes = {name: chunks[own_chunk][name].student.dtype for name in names}
    exchanges = [
        # the way back: to the chunk's owner, from the rank that had this rank's chunk
        Exchange(
            [grads[stage.chunk][name].to(dtypes[name]) for name in names],
            stage.chunk,
            stage.to,
            plan.axis,
        )
        for stage in plan.stages
        if stage.to is not None
    ]
    plan.traffic.gradients += sum(exchange.sent_bytes for exchange in exchanges)
    total = grads[own_chunk]
    for exchange in exchanges:
        for name, part in zip(names, exchange.wait(), strict=True):
            total[name] += part
    return {name: total[name].to(dtypes[name]) for name in names}
