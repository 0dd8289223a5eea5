"""What all terms of a loss have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from megalard.config.objective import ObjectiveConfig
from megalard.data.batch import Batch
from megalard.distill.lockstep import LayerPair
from megalard.distill.reach import Reach
from megalard.distill.terms.sharded_relations import RelationPlan
from megalard.errors import UserError
from megalard.model.decoder import Decoder
from megalard.parallel.ops import tensor_axis


@dataclass(frozen=True)
class TermSum:
    """The sum of a term over this rank's share of a micro-batch.

    Attributes:
        loss: the weighted sum, a scalar to differentiate.
        parts: the unweighted sums, fp32 [names], detached, in the order of the term's ``weights``.
    """

    loss: torch.Tensor
    parts: torch.Tensor

    @classmethod
    def single(cls, total: torch.Tensor, weight: float, share: float = 1.0) -> TermSum:
        """Make the sum of a term with one part.

        Args:
            total: the unweighted sum.
            share: the share of the sum that this rank reports, if several ranks compute all of it.
        """
        return cls(weight * total, (total.detach() * share)[None])


class TermInputs:
    """What a term may read of a micro-batch, computed once for all terms.

    Attributes:
        teacher: None if the stream has no teacher.
        student: the student.
        batch: this rank's share of the micro-batch.
    """

    def __init__(self, teacher: Decoder | None, student: Decoder, batch: Batch):
        self.teacher, self.student, self.batch = teacher, student, batch

    @cached_property
    def valid_bs(self) -> torch.Tensor:
        """Which of this rank's tokens are not padding, bool [b, s]."""
        return self.batch.valid_bs()

    @cached_property
    def relation_plan(self) -> RelationPlan:
        """The tasks and masks of the relations, which are the same for all layers."""
        return RelationPlan(self.batch.shard, self.batch.doc_start_bn, self.batch.doc_end_bn)


class Term(ABC):
    """One summand of a stream's loss.

    The step's loss contains, for each term, its weighted sum over all tokens of the step, divided
    by the term's count over all tokens of the step. A term computes this rank's part of both.

    Attributes:
        weights: the names under which the term is reported, each with its weight. Most terms have
            one.
        needs_attention_output: whether ``on_layer`` reads attention outputs.
        layers: the layers for which ``on_layer`` returns a sum, in ascending order.
        is_mean_over_layers: whether the term is the mean over these layers, or their sum.

    Args:
        objective: the weights and settings of all terms.
        student: the student, or any decoder of its shape and slices.
        kv_replicas: the number of tp ranks that hold the same K/V heads.
    """

    weights: dict[str, float]
    needs_attention_output = False
    layers: Sequence[int] = ()
    is_mean_over_layers = False

    def __init__(self, objective: ObjectiveConfig, student: Decoder, kv_replicas: int):
        self.objective = objective
        self.spec, self.axis = student.spec, tensor_axis(student)

    @staticmethod
    @abstractmethod
    def reach_of(objective: ObjectiveConfig, num_layers: int) -> Reach | None:
        """Return how deep the term reads; None if it has no weight.

        Raises:
            UserError: the objective does not fit a model of this many layers.
        """

    def count(self, batch: Batch) -> float | torch.Tensor:
        """Return what this rank adds to the term's count: a number, or a scalar on the device."""
        return float(batch.valid_tokens)

    def on_layer(self, pair: LayerPair, inputs: TermInputs) -> TermSum | None:
        """Return the term's sum over one layer; None if it does not read the layer."""
        return None

    def on_output(
        self, student_x: torch.Tensor, teacher_x: torch.Tensor | None, inputs: TermInputs
    ) -> TermSum | None:
        """Return the term's sum over the outputs of the last layer; None if it does not read them.

        Args:
            student_x, teacher_x: the outputs [t/tp, hidden], before the final norm.
        """
        return None


def compared_layers(objective: ObjectiveConfig, num_layers: int) -> list[int]:
    """Return the layers whose relations and attention outputs are compared.

    Raises:
        UserError: the objective names a layer that the model does not have.
    """
    layers = sorted(objective.layers) if objective.layers is not None else list(range(num_layers))
    if layers[-1] >= num_layers:
        raise UserError(
            f"objective.layers names layer {layers[-1]}, but the model has layers 0 to "
            f"{num_layers - 1}: leave it out"
        )
    return layers
