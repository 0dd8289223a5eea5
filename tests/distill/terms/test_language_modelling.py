"""The cross-entropy of the next token, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalard.config.objective import ObjectiveConfig
from megalard.distill.reach import LayerDepth, Reach
from megalard.distill.terms.language_modelling import LanguageModelling, cross_entropy_sum
from megalard.distill.terms.term import TermInputs


def plain(decoder, hidden, target_bs):
    """Return the sum that torch computes from all logits at once."""
    logits = F.linear(decoder.model.norm(hidden), decoder.head_weight)
    return F.cross_entropy(logits, target_bs.flatten(), ignore_index=-1, reduction="sum")


def test_the_sum_and_its_gradient_are_torchs(decoders, hidden):
    _, student = decoders
    target = torch.randint(-1, 67, (1, 24), generator=torch.Generator().manual_seed(0))
    results = []
    for function in (cross_entropy_sum, plain):
        leaf = hidden[1].clone().requires_grad_()
        total = function(student, leaf, target)
        total.backward()
        results.append((total.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_term_counts_tokens_that_have_a_next_token(decoders, hidden, batch):
    """In documents of 5, 7 and 7 tokens these are 4, 6 and 6."""
    _, student = decoders
    term = LanguageModelling(ObjectiveConfig(language_modelling=0.3), student, 1)
    assert term.count(batch) == 16 and term.weights == {"lm": 0.3}
    total = term.on_output(hidden[1], None, TermInputs(None, student, batch))
    expected = plain(student, hidden[1], batch.target_bs)
    assert total.parts.tolist() == pytest.approx([float(expected)], rel=1e-5)
    assert float(total.loss.detach()) == pytest.approx(0.3 * float(expected), rel=1e-5)


def test_it_reads_everything_and_only_with_a_weight():
    reach = LanguageModelling.reach_of(ObjectiveConfig(language_modelling=0.3), 5)
    assert reach == Reach(4, LayerDepth.WHOLE, norm=True, head=True)
    assert LanguageModelling.reach_of(ObjectiveConfig(), 5) is None
