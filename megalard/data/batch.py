"""Blocks as tensors: the batch every part of the trainer reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megalard.data.blocks import Block


@dataclass(frozen=True)
class Batch:
    """Some rows of tokens and where their documents lie.

    Attributes:
        tokens_bs: int64 ``[b, s]``.
        position_bs: int64 ``[b, s]``, a token's position in its own document's part of the row,
            from 0; 0 on padding.
        doc_start_bs, doc_end_bs: int32 ``[b, s]``, the half-open interval of the row that the
            token's document takes; 0 and 0 on padding, so that an empty interval marks it.
        documents: ``(row, start, end)`` of every document, on the host.
        valid_tokens: how many tokens are not padding.
        sample_b: int64 ``[b]``, each row's place in the step's global batch.
    """

    tokens_bs: torch.Tensor
    position_bs: torch.Tensor
    doc_start_bs: torch.Tensor
    doc_end_bs: torch.Tensor
    documents: tuple[tuple[int, int, int], ...]
    valid_tokens: int
    sample_b: torch.Tensor

    def token_ids(self) -> torch.Tensor:
        """int64 ``[b * s]``: a number for each token that no other token of the step has."""
        length = self.tokens_bs.shape[1]
        token = torch.arange(length, device=self.sample_b.device)
        return (self.sample_b[:, None] * length + token).flatten()

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``; to a GPU from pinned memory, without waiting for the copy."""
        device = torch.device(device)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda" and tensor.device.type == "cpu":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        return replace(
            self,
            tokens_bs=move(self.tokens_bs),
            position_bs=move(self.position_bs),
            doc_start_bs=move(self.doc_start_bs),
            doc_end_bs=move(self.doc_end_bs),
            sample_b=move(self.sample_b),
        )


def collate(blocks: Sequence[Block], samples: Sequence[int] | None = None) -> Batch:
    """One row for each block, in order; all blocks are of one length.

    Args:
        samples: the rows' places in the step's global batch; 0, 1, ... when not given.
    """
    tokens_bs = torch.stack([torch.from_numpy(tokens) for tokens, _ in blocks])
    position_bs = torch.zeros_like(tokens_bs)
    doc_start_bs = torch.zeros_like(tokens_bs, dtype=torch.int32)
    doc_end_bs = torch.zeros_like(doc_start_bs)
    documents = tuple(
        (row, start, end) for row, (_, intervals) in enumerate(blocks) for start, end in intervals
    )
    for row, start, end in documents:
        torch.arange(end - start, out=position_bs[row, start:end])
        doc_start_bs[row, start:end] = start
        doc_end_bs[row, start:end] = end
    return Batch(
        tokens_bs=tokens_bs,
        position_bs=position_bs,
        doc_start_bs=doc_start_bs,
        doc_end_bs=doc_end_bs,
        documents=documents,
        valid_tokens=sum(end - start for _, start, end in documents),
        sample_b=torch.as_tensor(range(len(blocks)) if samples is None else samples),
    )
