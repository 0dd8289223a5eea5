"""What the student is to learn from one stream: the terms of its loss, summed over a micro-batch.

Each rank sums over its own tokens, heads and columns; sums over ranks, and the division by the
step's counts, are the step's.
"""

from __future__ import annotations

import torch
from torch.profiler import record_function

from megalard.config.schema import StreamConfig
from megalard.data.batch import Batch
from megalard.distill.lockstep import Pair, lockstep
from megalard.distill.reach import hidden_states, reach_of
from megalard.distill.terms.logits import chosen_rows, cross_entropy_sum, logits_kl_sum
from megalard.distill.terms.relations import RelationObjective
from megalard.distill.terms.sharded_relations import RelationPlan
from megalard.distill.terms.states import context_sum, cosine_sum
from megalard.model.decoder import Decoder
from megalard.transfer import to_device

# What a term's sum is divided by: the stream's valid tokens, those whose logits are compared, and
# those with a target.
VALID, LOGITS, TARGETS = range(3)


class StreamObjective:
    """A stream's loss, term by term.

    Attributes:
        weights: name of each term, such as ``q``, ``context`` or ``logits``, to its weight.
        counts: name of each term to what it is a mean over.

    Args:
        stream: the terms' weights.
        student: the student, or any decoder of its shape and axis.
        kv_replicas: tp ranks holding the same K/V heads.
        dtype: of the activations.
        recompute: activation checkpointing.
    """

    def __init__(
        self,
        stream: StreamConfig,
        student: Decoder,
        kv_replicas: int,
        dtype: torch.dtype,
        recompute: bool,
    ):
        self.config, self.dtype, self.recompute = stream.objective, dtype, recompute
        spec = student.spec
        self.reach = reach_of(self.config, spec.num_layers)
        self.layers = set(self.config.layers or range(spec.num_layers))
        self.states = hidden_states(self.config, spec.num_layers)
        relations = self.config.active_relations()
        self.relations = (
            RelationObjective(spec, relations, len(self.layers), kv_replicas) if relations else None
        )
        terms = {
            "context": (self.config.attention_context, VALID),
            "hidden": (self.config.hidden_cosine, VALID),
            "logits": (self.config.logits_kl, LOGITS),
            "lm": (self.config.language_modelling, TARGETS),
        }
        used = {name: term for name, term in terms.items() if term[0] > 0}
        self.weights = relations | {name: weight for name, (weight, _) in used.items()}
        self.counts = dict.fromkeys(relations, VALID) | {name: of for name, (_, of) in used.items()}
        self._per_context = 1.0 / (len(self.layers) * spec.num_heads)
        self._tp = student.ops.axis

    def count(self, batch: Batch) -> torch.Tensor:
        """fp32 [3]: this rank's VALID, LOGITS and TARGETS of a micro-batch."""
        compared = len(self._compared(batch))
        known = to_device(torch.tensor([batch.valid_tokens, compared, 0.0]), batch.tokens_bs.device)
        known[TARGETS] = (batch.target_bs >= 0).sum()
        return known

    def __call__(
        self, teacher: Decoder | None, student: Decoder, batch: Batch, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a micro-batch on this rank.

        Args:
            scale: fp32 [3], the stream's weight over the step's counts.

        Returns:
            A scalar to differentiate, and fp32 [terms], this rank's part of each term's sum, in the
            order of ``weights``.
        """
        if not self.config.needs_teacher:
            teacher = None
        plan = None
        if self.relations is not None:
            plan = RelationPlan(batch.shard, batch.doc_start_bn, batch.doc_end_bn)
        parts = {name: scale.new_zeros(()) for name in self.weights}
        loss = scale.new_zeros(())

        def add(name: str, total: torch.Tensor, share: float = 1.0) -> None:
            nonlocal loss
            loss = loss + self.weights[name] * total * scale[self.counts[name]]
            parts[name] = parts[name] + total.detach() * share

        with_mixed = self.config.attention_context > 0
        valid = batch.valid_bs() if with_mixed or self.config.hidden_cosine > 0 else None
        x_s, x_t = None, None
        for pair in lockstep(
            teacher, student, batch, self.dtype, self.reach, with_mixed, self.recompute
        ):
            x_s = pair.student.residual
            x_t = pair.teacher.residual if pair.teacher else None
            if pair.layer in self.layers:
                if plan is not None:
                    with record_function("relations"):
                        total, sums = self.relations(pair.student.qkv, pair.teacher.qkv, plan)
                    loss = loss + total * scale[VALID]
                    for name, value in zip(self.relations.names, sums, strict=True):
                        parts[name] = parts[name] + value
                if with_mixed:
                    total = context_sum(pair.student.mixed, pair.teacher.mixed, valid)
                    add("context", total * self._per_context)
            if self.config.hidden_cosine > 0 and pair.layer + 1 in self.states:
                add("hidden", self._cosine(pair.layer + 1, teacher, student, pair, valid))
            # not beside the next layer's, nor beside the head's logits
            del pair
        # every tp rank has the whole sum over the vocabulary; each reports its share of it
        share = 1.0 / self._tp.size
        if self.config.logits_kl > 0:
            rows = self._compared(batch)
            total = logits_kl_sum(teacher, student, x_t, x_s, rows)
            add("logits", total, share)
        if self.config.language_modelling > 0:
            add("lm", cross_entropy_sum(student, x_s, batch.target_bs), share)
        return loss, torch.stack(list(parts.values()))

    def _compared(self, batch: Batch) -> torch.Tensor:
        if self.config.logits_kl == 0:
            return torch.empty(0, dtype=torch.int64)
        return chosen_rows(batch, self.config.logits_positions)

    def _cosine(
        self, state: int, teacher: Decoder, student: Decoder, pair: Pair, valid_bs: torch.Tensor
    ) -> torch.Tensor:
        x_s, x_t = pair.student.residual, pair.teacher.residual
        if state == student.spec.num_layers:
            x_s = student.model.norm(x_s)
            with torch.no_grad():
                x_t = teacher.model.norm(x_t)
        rows = len(x_s)
        first = self._tp.rank * rows
        return cosine_sum(x_s, x_t, valid_bs.flatten()[first : first + rows])
