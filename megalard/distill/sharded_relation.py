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
    chunk_mask,
    finish,
    merge,
    relation_backward,
    relation_forward,
    relation_partials,
    rescale,
)
from megalard.parallel.collectives import all_reduce
from megalard.parallel.context import Exchange, SequenceShard
from megalard.parallel.schedule import (
    Stage,
    Task,
    chunk_of,
    difference_cover,
    pieces_of,
    schedule,
)

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
        self._masks = {
            task: self._mask(task, doc_start_bs, doc_end_bs)
            for stage in self.stages
            for task in stage.tasks
        }

    def row_slice(self, task: Task) -> slice:
        """The task's rows within their chunk."""
        return self._slice(task.rows, task.half)

    def column_slice(self, task: Task) -> slice:
        """The task's columns within their chunk."""
        return self._slice(task.columns, None)

    def mask(self, task: Task) -> IntervalMask:
        return self._masks[task]

    def chunks(self, task: Task) -> tuple[int, int]:
        """The chunks that own the task's rows and columns."""
        return chunk_of(task.rows, self.axis.size), chunk_of(task.columns, self.axis.size)

    def _slice(self, piece: int, half: int | None) -> slice:
        size = self.shard.piece_length
        chunk = chunk_of(piece, self.axis.size)
        start = pieces_of(chunk, self.axis.size).index(piece) * size
        if half is None:
            return slice(start, start + size)
        middle = start + (size + 1) // 2
        return slice(start, middle) if half == 0 else slice(middle, start + size)

    def _mask(self, task: Task, doc_start_bs, doc_end_bs) -> IntervalMask:
        rows, columns, size = self.row_slice(task), self.column_slice(task), self.shard.piece_length
        within = rows.start % size if task.half == 1 else 0
        return chunk_mask(
            doc_start_bs,
            doc_end_bs,
            row_offset=task.rows * size + within,
            n=rows.stop - rows.start,
            col_offset=task.columns * size,
            m=columns.stop - columns.start,
        )


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
    chunks: dict[int, dict[str, Operand]] = {}
    partials: dict[str, dict[int, Partials]] = {name: {} for name in weights}
    if plan.axis.size == 1:
        return _alone(operands, weights, plan, with_grad)

    for stage, exchanged in _arrivals(operands, names, plan):
        chunks[stage.chunk] = exchanged
        for task in stage.tasks:
            for name in weights:
                rows, columns = _task_operands(name, task, chunks, plan)
                part = relation_partials(
                    rows.student, rows.teacher, columns.student, columns.teacher,
                    mask=plan.mask(task),
                )  # fmt: skip
                _merge_rows(partials[name], plan, task, part)

    statistics = {name: _reduce_rows(partials[name], plan) for name in weights}
    sums = {}
    for name, found in statistics.items():
        own = plan.shard.cut(found.kl, 2)
        sums[name] = own.sum()
    if not with_grad:
        return sums, {}
    return sums, _gradients(chunks, names, weights, statistics, plan)


def _alone(operands, weights, plan, with_grad):
    (task,) = plan.stages[0].tasks
    mask, sums, grads = plan.mask(task), {}, {}
    shared = sum(name in OPERANDS[r] for r in weights for name in set(OPERANDS[r])) > len(operands)
    for name, weight in weights.items():
        rows, columns = (operands[kind] for kind in OPERANDS[name])
        other = (None, None) if rows is columns else (columns.student, columns.teacher)
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
    row_chunk, column_chunk = plan.chunks(task)
    row_kind, column_kind = OPERANDS[name]
    return (
        chunks[row_chunk][row_kind].rows(plan.row_slice(task)),
        chunks[column_chunk][column_kind].rows(plan.column_slice(task)),
    )


def _merge_rows(found: dict[int, Partials], plan: RelationPlan, task: Task, part: Partials):
    """Merge the task's rows into the piece's partials, which cover the whole piece."""
    size = plan.shard.piece_length
    if part.m_s.shape[2] != size:
        part = _placed(part, 0 if task.half == 0 else size - part.m_s.shape[2], size)
    known = found.get(task.rows)
    found[task.rows] = part if known is None else merge(known, part)


def _placed(part: Partials, start: int, size: int) -> Partials:
    """The partials of some rows among ``size`` rows, of which the others saw nothing."""
    fields = {}
    for name, x in part._asdict().items():
        fill = float("-inf") if name.startswith("m_") else 0.0
        whole = x.new_full((*x.shape[:2], size), fill)
        whole[:, :, start : start + x.shape[2]] = x
        fields[name] = whole
    return Partials(**fields)


def _reduce_rows(found: dict[int, Partials], plan: RelationPlan) -> RelationStatistics:
    """Statistics of all rows of the blocks, exact and the same on every rank."""
    any_part = next(iter(found.values()))
    nothing = _placed(Partials(*(x[:, :, :0] for x in any_part)), 0, plan.shard.piece_length)
    pieces = [found.get(piece, nothing) for piece in plan.shard.all_pieces]
    local = Partials(*(torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True)))
    maxima = all_reduce(torch.stack((local.m_s, local.m_t)), plan.axis, dist.ReduceOp.MAX)
    local = rescale(local, maxima[0], maxima[1])
    sums = all_reduce(torch.stack((local.l_s, local.l_t, local.a)), plan.axis)
    plan.traffic.reduced += (maxima.numel() + sums.numel()) * maxima.element_size()
    return finish(Partials(maxima[0], sums[0], maxima[1], sums[1], sums[2]))


def _gradients(chunks, names, weights, statistics, plan) -> dict[str, torch.Tensor]:
    """Gradients of the own chunk: this rank's pairs, and what the others computed for it."""
    grads = {
        chunk: {
            name: torch.zeros_like(operand.student, dtype=torch.float32)
            for name, operand in of_chunk.items()
        }
        for chunk, of_chunk in chunks.items()
    }
    size = plan.shard.piece_length
    for task in (task for stage in plan.stages for task in stage.tasks):
        start = task.rows * size + (plan.row_slice(task).start % size if task.half == 1 else 0)
        row_chunk, column_chunk = plan.chunks(task)
        for name, weight in weights.items():
            rows, columns = _task_operands(name, task, chunks, plan)
            span = slice(start, start + rows.student.shape[2])
            lse_s, lse_t = (x[:, :, span] for x in statistics[name][:2])
            same = task.rows == task.columns and name != "qk"
            other = (None, None) if same else (columns.student, columns.teacher)
            parts = relation_backward(
                rows.student, rows.teacher, *other, lse_s, lse_t, lse_s.new_full((1, 1, 1), weight),
                mask=plan.mask(task), out_dtype=torch.float32,
            )  # fmt: skip
            row_kind, column_kind = OPERANDS[name]
            row_grad = parts if same else parts[0]
            grads[row_chunk][row_kind][:, :, plan.row_slice(task)] += row_grad
            if not same:
                grads[column_chunk][column_kind][:, :, plan.column_slice(task)] += parts[1]
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
