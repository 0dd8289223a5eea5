"""Partials of a row merge exactly, also where some of them are empty."""

from itertools import pairwise

import torch

from megalard.kernels.relation_kl import Partials, finish, merge, rescale


def test_empty_partials_merge_without_nan():
    empty = Partials(*(torch.full((1, 1, 3), x) for x in (-torch.inf, 0.0, -torch.inf, 0.0, 0.0)))
    lse_s, lse_t, kl = finish(merge(empty, empty))
    assert (
        torch.equal(kl, torch.zeros(1, 1, 3)) and lse_s.isneginf().all() and lse_t.isneginf().all()
    )
    some = Partials(*(torch.full((1, 1, 3), x) for x in (2.0, 1.5, 3.0, 1.25, 0.5)))
    for merged in (merge(empty, some), merge(some, empty)):
        assert all(torch.equal(x, y) for x, y in zip(merged, some, strict=True))


def partials_of(s: torch.Tensor, t: torch.Tensor, below: float = 0.0) -> Partials:
    """Partials of scores [..., columns], by their definition; m lies ``below`` the maximum."""
    m_s, m_t = s.amax(-1) - below, t.amax(-1) - below
    p_s, p_t = (s - m_s[..., None]).exp(), (t - m_t[..., None]).exp()
    return Partials(m_s, p_s.sum(-1), m_t, p_t.sum(-1), (p_t * (t - s)).sum(-1))


def test_merged_parts_give_the_statistics_of_the_softmax():
    """In float64, so the tolerance is its rounding; every m lies below its part's maximum by 3."""
    s, t = torch.randn(2, 1, 2, 5, 40, dtype=torch.float64).mul(4).unbind(0)
    parts = [partials_of(s[..., i:j], t[..., i:j], below=3.0) for i, j in pairwise((0, 1, 9, 40))]
    lse_s, lse_t, kl = finish(merge(merge(parts[0], parts[1]), parts[2]))
    logp_s, logp_t = s.log_softmax(-1), t.log_softmax(-1)
    torch.testing.assert_close(lse_s, s.logsumexp(-1), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse_t, t.logsumexp(-1), atol=1e-12, rtol=1e-12)
    expected = (logp_t.exp() * (logp_t - logp_s)).sum(-1)
    torch.testing.assert_close(kl, expected, atol=1e-12, rtol=1e-12)


def test_rescaling_moves_the_sums_and_does_not_change_the_statistics():
    s, t = torch.randn(2, 1, 2, 5, 40, dtype=torch.float64).unbind(0)
    partials = partials_of(s, t)
    moved = rescale(partials, partials.m_s + 2.0, partials.m_t + 5.0)
    expected = (*partials_of(s, t, below=-2.0)[:2], *partials_of(s, t, below=-5.0)[2:])
    for x, y in zip(moved, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)
    for x, y in zip(finish(moved), finish(partials), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)
