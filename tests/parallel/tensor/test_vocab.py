"""Statistics over a vocabulary that ranks share, against torch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.parallel.tensor.vocab import arg_max, cross_entropy, kl_divergence, log_sum_exp
from tests.ranks import run_ranks

ROWS = 9


def logits(vocab: int, seed: int = 0) -> torch.Tensor:
    """Return logits [ROWS, vocab], large enough that exp without a maximum would overflow."""
    generator = torch.Generator().manual_seed(seed)
    return 40 * torch.randn(ROWS, vocab, generator=generator, dtype=torch.float64)


def check(vocab: int, start: int, end: int, axis) -> None:
    """Compare all statistics on a rank that holds the ids from ``start`` to ``end``."""
    student, teacher = logits(vocab), logits(vocab, seed=1)
    target = torch.arange(ROWS) % vocab
    part = student[:, start:end].clone().requires_grad_()
    torch.testing.assert_close(log_sum_exp(part.detach(), axis), student.logsumexp(1))

    full = student.clone().requires_grad_()
    expected = F.cross_entropy(full, target, reduction="none")
    upstream = torch.arange(1.0, ROWS + 1, dtype=torch.float64)
    loss = cross_entropy(part, target, start, axis)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, part, upstream)
    (wanted,) = torch.autograd.grad(expected, full, upstream)
    torch.testing.assert_close(grad, wanted[:, start:end])

    log_s, log_t = full.log_softmax(1), teacher.log_softmax(1)
    expected = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(1)
    kl = kl_divergence(part, teacher[:, start:end], axis)
    torch.testing.assert_close(kl, expected)
    (grad,) = torch.autograd.grad(kl, part, upstream)
    (wanted,) = torch.autograd.grad(expected, full, upstream)
    torch.testing.assert_close(grad, wanted[:, start:end], rtol=1e-6, atol=1e-9)

    assert torch.equal(arg_max(student[:, start:end], start, axis), student.argmax(1))


def test_a_single_rank_computes_what_torch_computes():
    check(11, 0, 11, SINGLE)


def test_the_smallest_id_wins_a_tie():
    tied = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 0.0]])
    assert arg_max(tied, 10, SINGLE).tolist() == [11, 10]


def _on_ranks(vocab: int) -> None:
    axis = build_mesh("cpu", 3).tp
    rows = -(-vocab // 3)
    start = min(axis.rank * rows, vocab)
    check(vocab, start, min(start + rows, vocab), axis)
    # A tie between ranks.
    tied = torch.zeros(ROWS, vocab)[:, start : start + rows]
    assert arg_max(tied, start, axis).tolist() == [0] * ROWS


@pytest.mark.parametrize("vocab", [11, 4])
def test_ranks_compute_what_torch_computes(vocab):
    """Of four ids the last of three ranks holds none."""
    run_ranks(3, _on_ranks, vocab)
