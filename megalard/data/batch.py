"""Blocks as tensors: the batch every part of the trainer reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch

from megalard.data.blocks import Block
from megalard.parallel.context.attention import attend_over_axis
from megalard.parallel.context.shard import SequenceShard, Span
from megalard.parallel.mesh import Axis
from megalard.transfer import to_device


@dataclass(frozen=True)
class Batch:
    """Some rows of tokens and where their documents lie, as one rank reads them.

    ``s`` is the tokens of a row that this rank owns; documents lie in the whole row of ``n``. A
    fresh batch is whole (``s = n``); ``cut`` takes a rank's share.

    Attributes:
        tokens_bs: int64 ``[b, s]``.
        target_bs: int64 ``[b, s]``, the token that follows each in its document; -1 after a
            document's last and on padding.
        position_bs: int64 ``[b, s]``, a token's position in its own document's part of the row,
            from 0; 0 on padding.
        student_position_bs: int64 ``[b, s]``, where the student reads each token.
        place_s: int64 ``[s]``, where each token stands in its row.
        doc_start_bn, doc_end_bn: int32 ``[b, n]``, the half-open interval of the row that the
            token's document takes; 0 and 0 on padding, so that an empty interval marks it.
        documents: ``(row, start, end)`` of every document, on the host.
        sample_b: int64 ``[b]``, each row's place in the step's global batch.
        shard: which tokens of a row are this rank's.
    """

    tokens_bs: torch.Tensor
    target_bs: torch.Tensor
    position_bs: torch.Tensor
    student_position_bs: torch.Tensor
    place_s: torch.Tensor
    doc_start_bn: torch.Tensor
    doc_end_bn: torch.Tensor
    documents: tuple[tuple[int, int, int], ...]
    sample_b: torch.Tensor
    shard: SequenceShard

    @property
    def spans(self) -> tuple[Span, ...]:
        """The parts of the documents that this rank's tokens are in."""
        return self.shard.spans(self.documents)

    def attention(self) -> Callable[..., torch.Tensor]:
        """``attend_over_axis`` of q, k, v and a window, for this batch's documents."""
        known = {"shard": self.shard, "documents": self.documents, "spans": self.spans}
        return partial(attend_over_axis, **known)

    @property
    def valid_tokens(self) -> int:
        """How many of this rank's tokens are not padding."""
        return sum(span.end - span.start for span in self.spans)

    def token_ids(self) -> torch.Tensor:
        """int64 ``[b * s]``: a number for each token that no other token of the step has."""
        return (self.sample_b[:, None] * self.shard.length + self.place_s).flatten()

    def valid_bs(self) -> torch.Tensor:
        """bool ``[b, s]``: this rank's tokens that are not padding."""
        return self.shard.cut(self.doc_end_bn > self.doc_start_bn, 1)

    def for_student(self) -> "Batch":
        """The batch with the student's positions."""
        return replace(self, position_bs=self.student_position_bs)

    def cut(self, axis: Axis) -> "Batch":
        """A whole batch's share of this rank of the cp axis.

        Raises:
            UserError: the rows do not divide into the axis's pieces.
        """
        shard = SequenceShard(self.shard.length, axis)
        return replace(
            self,
            tokens_bs=shard.cut(self.tokens_bs, 1),
            target_bs=shard.cut(self.target_bs, 1),
            position_bs=shard.cut(self.position_bs, 1),
            student_position_bs=shard.cut(self.student_position_bs, 1),
            place_s=shard.cut(self.place_s, 0),
            shard=shard,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``."""
        tensors = {
            field.name: to_device(value, torch.device(device))
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **tensors)


def collate(
    blocks: Sequence[Block],
    samples: Sequence[int] | None = None,
    student_positions: Sequence[np.ndarray] | None = None,
) -> Batch:
    """One row for each block, in order; all blocks are of one length.

    Args:
        samples: the rows' places in the step's global batch; 0, 1, ... when not given.
        student_positions: a row's places to positions, int64 ``[n]`` for each row; the student
            reads as the teacher does when not given.
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
    return Batch(
        tokens_bs=tokens_bs,
        target_bs=target_bs,
        position_bs=position_bs,
        student_position_bs=(
            position_bs
            if student_positions is None
            else torch.from_numpy(np.stack(student_positions))
        ),
        place_s=torch.arange(tokens_bs.shape[1]),
        doc_start_bn=doc_start_bn,
        doc_end_bn=doc_end_bn,
        documents=documents,
        sample_b=torch.as_tensor(range(len(blocks)) if samples is None else samples),
        shard=SequenceShard(tokens_bs.shape[1]),
    )
