"""KL(teacher || student) of the next token, against torch's, and which tokens are compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalard.config.objective import ObjectiveConfig
from megalard.data.batch import collate
from megalard.distill.reach import LayerDepth, Reach
from megalard.distill.terms.logits_kl import LogitsKl, compared_rows, logits_kl_sum
from megalard.distill.terms.term import TermInputs
from megalard.parallel.mesh import Axis

LENGTH = 24
BLOCKS = [
    (np.arange(LENGTH), [(0, 5), (5, LENGTH)]),
    (np.arange(100, 100 + LENGTH), [(3, 9), (11, 12)]),
    (np.arange(200, 200 + LENGTH), [(0, LENGTH)]),
    (np.arange(300, 300 + LENGTH), []),
]


@pytest.mark.parametrize("last", [None, 1, 4, 7, LENGTH, LENGTH + 1])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_last_valid_tokens_of_each_block_are_compared(last, ranks):
    tokens = []
    for rank in range(ranks):
        batch = collate(BLOCKS).cut(Axis(None, rank, ranks))
        tokens += batch.tokens_bs.flatten()[compared_rows(batch, last)].tolist()
    expected = []
    for block, documents in BLOCKS:
        valid = [int(block[i]) for start, end in documents for i in range(start, end)]
        # Of a block with fewer valid tokens all are compared.
        expected += valid if last is None or len(valid) < last else valid[-last:]
    assert sorted(tokens) == expected


def plain(teacher, student, teacher_x, student_x, rows, temperature=1.0):
    """Return the sum that torch computes from all logits at once."""
    log_s, log_t = (
        (F.linear(decoder.model.norm(x)[rows], decoder.head_weight) / temperature).log_softmax(-1)
        for decoder, x in ((student, student_x), (teacher, teacher_x))
    )
    return F.kl_div(log_s, log_t, log_target=True, reduction="sum")


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_sum_and_its_gradient_are_torchs(temperature, decoders, hidden):
    teacher_x, student_x = hidden
    rows, results = torch.tensor([0, 3, 4, 23]), []
    for function in (logits_kl_sum, plain):
        leaf = student_x.clone().requires_grad_()
        total = function(*decoders, teacher_x, leaf, rows, temperature)
        total.backward()
        results.append((total.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_rank_without_a_compared_token_takes_part(decoders, hidden):
    leaf = hidden[1].clone().requires_grad_()
    total = logits_kl_sum(*decoders, hidden[0], leaf, torch.empty(0, dtype=torch.int64))
    assert total.item() == 0
    total.backward()
    assert not leaf.grad.any()


def test_the_term_is_the_sum_over_compared_tokens(decoders, hidden, batch):
    """The last two tokens of each block: 10 and 11 of the first, 7 and 8 of the second."""
    teacher, student = decoders
    objective = ObjectiveConfig(logits_kl=0.5, logits_positions=2)
    term = LogitsKl(objective, student, 1)
    assert term.count(batch) == 4 and term.weights == {"logits": 0.5}
    assert LogitsKl(ObjectiveConfig(logits_kl=0.5), student, 1).count(batch) == 19
    total = term.on_output(hidden[1], hidden[0], TermInputs(teacher, student, batch))
    rows = torch.tensor([10, 11, 12 + 7, 12 + 8])
    expected = float(plain(teacher, student, *hidden, rows))
    assert total.parts.tolist() == pytest.approx([expected], rel=1e-5)
    assert float(total.loss.detach()) == pytest.approx(0.5 * expected, rel=1e-5)


def test_it_reads_everything_and_only_with_a_weight():
    reach = LogitsKl.reach_of(ObjectiveConfig(logits_kl=0.3), 5)
    assert reach == Reach(4, LayerDepth.WHOLE, norm=True, head=True)
    assert LogitsKl.reach_of(ObjectiveConfig(), 5) is None
