"""The loss of one stream: a sum of terms, over this rank's share of a micro-batch.

Each rank sums over its own tokens, heads and columns. The step sums over ranks and divides by the
counts of all its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch

from megalard.config.objective import ObjectiveConfig
from megalard.config.schema import StreamConfig
from megalard.data.batch import Batch
from megalard.distill.lockstep import lockstep
from megalard.distill.reach import Reach, deepest
from megalard.distill.terms import TERMS
from megalard.distill.terms.term import Term, TermInputs, TermSum
from megalard.model.decoder import Decoder
from megalard.transfer import to_device


def reaches_of(objective: ObjectiveConfig, num_layers: int) -> list[Reach]:
    """Return how deep each active term of an objective reads.

    Raises:
        UserError: the objective does not fit a model of this many layers.
    """
    reaches = (term.reach_of(objective, num_layers) for term in TERMS)
    return [reach for reach in reaches if reach is not None]


def is_reached(name: str, streams: dict[str, StreamConfig], num_layers: int) -> bool:
    """Whether the loss of any stream depends on the parameter ``name``."""
    return any(
        reach.includes(name)
        for stream in streams.values()
        for reach in reaches_of(stream.objective, num_layers)
    )


@dataclass(frozen=True)
class LayerEntry:
    """One number that a stream's objective reports of a layer.

    Attributes:
        part: the name of the part of the loss, one of the ``weights`` of its term.
        layer: the layer, counted from 0.
        term: the place of the term among the stream's terms, whose count the sum is divided by.
        factor: what turns the layer's summand of the part into a value of the layer itself: the
            number of layers for a mean over layers.
    """

    part: str
    layer: int
    term: int
    factor: int


class StreamObjective:
    """The loss of one stream.

    Attributes:
        terms: the active terms.
        part_names: the names of all parts of the loss, term by term.
        layer_entries: what is reported of single layers.

    Args:
        stream: the weights of the terms.
        student: the student, or any decoder of its shape and slices.
        kv_replicas: the number of tp ranks that hold the same K/V heads.
        dtype: dtype of the activations.
        activation_checkpointing: whether only the input of each student layer is kept.
    """

    def __init__(
        self,
        stream: StreamConfig,
        student: Decoder,
        kv_replicas: int,
        dtype: torch.dtype,
        activation_checkpointing: bool,
    ):
        objective, num_layers = stream.objective, student.spec.num_layers
        self.terms: list[Term] = [
            term(objective, student, kv_replicas)
            for term in TERMS
            if term.reach_of(objective, num_layers) is not None
        ]
        self.part_names = [name for term in self.terms for name in term.weights]
        self.layer_entries = [
            LayerEntry(name, layer, number, len(term.layers) if term.is_mean_over_layers else 1)
            for number, term in enumerate(self.terms)
            for layer in term.layers
            for name in term.weights
        ]
        self.needs_teacher = objective.needs_teacher
        self._dtype, self._activation_checkpointing = dtype, activation_checkpointing
        self._reach = deepest(reaches_of(objective, num_layers))
        self._keep_attention_output = any(term.needs_attention_output for term in self.terms)

    def count(self, batch: Batch) -> torch.Tensor:
        """Return this rank's counts of a micro-batch, fp32 [terms]."""
        counts = [term.count(batch) for term in self.terms]
        on_host = [0.0 if isinstance(count, torch.Tensor) else count for count in counts]
        result = to_device(torch.tensor(on_host), batch.tokens_bs.device)
        for index, count in enumerate(counts):
            if isinstance(count, torch.Tensor):
                result[index] = count
        return result

    def __call__(
        self, teacher: Decoder | None, student: Decoder, batch: Batch, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of a micro-batch on this rank.

        Args:
            scale: fp32 [terms], the stream's weight divided by the counts of the step.

        Returns:
            The loss, a scalar to differentiate, and this rank's unweighted sums, fp32: one number
            for each of ``part_names``, and then one for each of ``layer_entries``.
        """
        inputs = TermInputs(teacher if self.needs_teacher else None, student, batch)
        loss = scale.new_zeros(())
        parts = [scale.new_zeros(len(term.weights)) for term in self.terms]
        layer_parts: list[list[torch.Tensor]] = [[] for _ in self.terms]

        def add(index: int, term_sum: TermSum | None) -> None:
            nonlocal loss
            if term_sum is not None:
                loss = loss + term_sum.loss * scale[index]
                parts[index] = parts[index] + term_sum.parts

        student_x, teacher_x = None, None
        for pair in lockstep(
            inputs.teacher,
            student,
            batch,
            self._dtype,
            self._reach,
            self._keep_attention_output,
            self._activation_checkpointing,
        ):
            for index, term in enumerate(self.terms):
                term_sum = term.on_layer(pair, inputs)
                add(index, term_sum)
                if term_sum is not None:
                    layer_parts[index].append(term_sum.parts)
            student_x = pair.student.residual
            teacher_x = pair.teacher.residual if pair.teacher else None
            # Free this layer's tensors before the next layer or the logits are allocated.
            del pair
        for index, term in enumerate(self.terms):
            add(index, term.on_output(student_x, teacher_x, inputs))
        return loss, torch.cat([*parts, *chain.from_iterable(layer_parts)])
