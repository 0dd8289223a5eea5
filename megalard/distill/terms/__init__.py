"""The terms of a stream's loss: one file with one class for each.

A new term is one such file, its class in ``TERMS``, and a weight in ``ObjectiveConfig``.
"""

from __future__ import annotations

from megalard.distill.terms.attention_output import AttentionOutput
from megalard.distill.terms.hidden_cosine import HiddenCosine
from megalard.distill.terms.language_modelling import LanguageModelling
from megalard.distill.terms.logits_kl import LogitsKl
from megalard.distill.terms.relations import Relations
from megalard.distill.terms.term import Term

# The order in which their sums are added up.
TERMS: tuple[type[Term], ...] = (
    Relations,
    AttentionOutput,
    HiddenCosine,
    LogitsKl,
    LanguageModelling,
)
