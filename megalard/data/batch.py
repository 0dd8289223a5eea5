"""Blocks as tensors: the batch that every part of the trainer reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from megalard.data.blocks import Block
from megalard.parallel.context.shard import SequenceShard, Span
from megalard.parallel.mesh import Axis
from megalard.transfer import to_device


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and the places of their documents, as one rank reads them.

    A row is a block of n tokens. This rank owns s of them: all n in a new batch, and its share
    after ``cut``.

    Attributes:
        tokens_bs: int64 [b, s], the token ids.
        target_bs: int64 [b, s], the next token of the same document; -1 after the last token of a
            document and on padding.
        position_bs: int64 [b, s], the position of a token within its document's part of the block,
            from 0; 0 on padding. The teacher reads at these positions.
        student_position_bs: int64 [b, s], the positions at which the student reads.
        reach_bs, student_reach_bs: int64 [b, s], one more than the largest position in the token's
            document, of teacher and student; 0 on padding.
        place_s: int64 [s], the place of each token in its block.
        doc_start_bn, doc_end_bn: int32 [b, n], the half-open interval of the block that the token's
            document takes; both 0 on padding.
        documents: ``(row, start, end)`` of every document, on the host.
        sample_b: int64 [b], the place of each row in the global batch of the step.
        shard: which tokens of a block are this rank's.
    """

    tokens_bs: torch.Tensor
    target_bs: torch.Tensor
    position_bs: torch.Tensor
    student_position_bs: torch.Tensor
    reach_bs: torch.Tensor
    student_reach_bs: torch.Tensor
    place_s: torch.Tensor
    doc_start_bn: torch.Tensor
    doc_end_bn: torch.Tensor
    documents: tuple[tuple[int, int, int], ...]
    sample_b: torch.Tensor
    shard: SequenceShard

    @property
    def spans(self) -> tuple[Span, ...]:
        """This rank's queries in each document."""
        return self.shard.spans(self.documents)

    @property
    def valid_tokens(self) -> int:
        """The number of this rank's tokens that are not padding."""
        return sum(span.end - span.start for span in self.spans)

    def token_ids(self) -> torch.Tensor:
        """Return a number for each of this rank's tokens, unique within the step: int64 [b * s]."""
        return (self.sample_b[:, None] * self.shard.length + self.place_s).flatten()

    def valid_bs(self) -> torch.Tensor:
        """Return which of this rank's tokens are not padding: bool [b, s]."""
        return self.shard.cut(self.doc_end_bn > self.doc_start_bn, 1)

    def for_student(self) -> Batch:
        """Return the batch with the positions of the student."""
        return replace(self, position_bs=self.student_position_bs, reach_bs=self.student_reach_bs)

    def cut(self, axis: Axis) -> Batch:
        """Return this rank's share of a new batch along the cp axis.

        Raises:
            UserError: the blocks do not divide into the pieces of the axis.
        """
        shard = SequenceShard(self.shard.length, axis)
        return replace(
            self,
            tokens_bs=shard.cut(self.tokens_bs, 1),
            target_bs=shard.cut(self.target_bs, 1),
            position_bs=shard.cut(self.position_bs, 1),
            student_position_bs=shard.cut(self.student_position_bs, 1),
            reach_bs=shard.cut(self.reach_bs, 1),
            student_reach_bs=shard.cut(self.student_reach_bs, 1),
            place_s=shard.cut(self.place_s, 0),
            shard=shard,
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        tensors: dict[str, Any] = {
            field.name: to_device(value, torch.device(device))
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **tensors)


def collate(
    blocks: Sequence[Block],
    samples: Sequence[int] | np.ndarray | None = None,
    student_positions: Sequence[np.ndarray] | None = None,
) -> Batch:
    """Return a batch with one row per block, in order; all blocks have the same length.

    Args:
        blocks: the ids of each block, and the intervals of its documents.
        samples: the place of each row in the global batch of the step; None means 0, 1, ...
        student_positions: int64 [n] for each row, the position at which the student reads each
            place of the block; None takes the teacher's positions.
    """
    tokens_bs = torch.stack([torch.from_numpy(tokens) for tokens, _ in blocks])
    target_bs = torch.full_like(tokens_bs, -1)
    position_bs = torch.zeros_like(tokens_bs)
    doc_start_bn = torch.zeros_like(tokens_bs, dtype=torch.int32)
    doc_end_bn = torch.zeros_like(doc_start_bn)
    documents = tuple(
        (row, start, end) for row, (_, intervals) in enumerate(blocks) for start, end in intervals
    )
    for row, start, end in documents:
        torch.arange(end - start, out=position_bs[row, start:end])
        target_bs[row, start : end - 1] = tokens_bs[row, start + 1 : end]
        doc_start_bn[row, start:end] = start
        doc_end_bn[row, start:end] = end
    student_position_bs = position_bs
    if student_positions is not None:
        student_position_bs = torch.from_numpy(np.stack(student_positions))
    return Batch(
        tokens_bs=tokens_bs,
        target_bs=target_bs,
        position_bs=position_bs,
        student_position_bs=student_position_bs,
        reach_bs=_reach(position_bs, documents),
        student_reach_bs=_reach(student_position_bs, documents),
        place_s=torch.arange(tokens_bs.shape[1]),
        doc_start_bn=doc_start_bn,
        doc_end_bn=doc_end_bn,
        documents=documents,
        sample_b=torch.as_tensor(range(len(blocks)) if samples is None else samples),
        shard=SequenceShard(tokens_bs.shape[1]),
    )


def _reach(position_bs: torch.Tensor, documents: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """Return one more than the largest position in each token's document: int64 [b, s]."""
    reach_bs = torch.zeros_like(position_bs)
    for row, start, end in documents:
        reach_bs[row, start:end] = position_bs[row, end - 1] + 1
    return reach_bs
