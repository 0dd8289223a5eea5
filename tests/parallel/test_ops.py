"""The operations of a decoder: those of a single rank are plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalard.data.batch import collate
from megalard.model.ops import Qkv
from megalard.model.projection import Projection
from megalard.parallel.ops import ParallelOps


def projection(weight: torch.Tensor) -> Projection:
    """Return a projection with a given weight."""
    result = Projection(weight.shape[1], weight.shape[0], bias=False)
    result.weight = torch.nn.Parameter(weight, requires_grad=False)
    return result


def test_a_single_rank_computes_with_plain_torch():
    torch.manual_seed(0)
    ops, x, table = ParallelOps(), torch.randn(6, 4), torch.randn(9, 4)
    first, second = torch.randn(3, 4), torch.randn(5, 4)
    outputs = ops.column(x, projection(first), projection(second))
    assert [torch.equal(y, x @ w.T) for y, w in zip(outputs, (first, second), strict=True)] == [
        True,
        True,
    ]
    assert torch.equal(ops.row(x, projection(first)), x @ first.T)
    ids = torch.tensor([8, 0, 3])
    assert torch.equal(ops.embed(ids, table, 0), table[ids])
    assert torch.equal(ops.logits(x, table), x @ table.T) and ops.gather(x) is x


def test_attention_is_causal_within_documents():
    torch.manual_seed(0)
    tokens = torch.arange(5).numpy()
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    out = ParallelOps().attend(Qkv(q, k, v), collate([(tokens, [(0, 2), (2, 5)])]), None)
    for start, end in ((0, 2), (2, 5)):
        parts = (x[:, :, start:end] for x in (q, k, v))
        expected = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2)
        torch.testing.assert_close(out[:, start:end], expected)


def test_dropout_is_switched_on_by_the_numbers_of_the_tokens():
    ops, numbers = ParallelOps(), torch.arange(4)
    assert ops.token_t is None and ops.with_dropout(numbers).token_t is numbers
    assert ops.token_t is None, "the operations without dropout are unchanged"
