"""The weights of layers with ``parallel.shard_weights``: what a rank keeps, and what it gathers.

Teacher and student each have the weights of the layer that they run, and of the next one. What they
share exists once. The backward pass goes through the student alone; the teacher still has its last
layer, and between steps each has one layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

from megalard.config.schema import ParallelConfig
from megalard.estimate.rank_layout import RankLayout
from megalard.model.names import ParameterName
from megalard.model.parameter_slice import ParameterSlice
from megalard.parallel.divided_weights import is_divided_weight

_AT_ONCE = 2


def kept_elements(
    slices: Mapping[str, ParameterSlice], parallel: ParallelConfig, layout: RankLayout
) -> dict[str, int]:
    """Return the elements that a rank keeps of each weight: all of its slice, or its rows of it."""
    kept = {}
    for name, held in slices.items():
        shape = held.local_shape
        if has_rows_of(name, held, parallel, layout):
            rows = -(-shape[0] // (layout.data * held.replicas))
            shape = (rows, *shape[1:])
        kept[name] = prod(shape)
    return kept


def has_rows_of(
    name: str, held: ParameterSlice, parallel: ParallelConfig, layout: RankLayout
) -> bool:
    """Whether a rank keeps only its rows of a parameter."""
    is_shared = layout.data * held.replicas > 1
    return parallel.shard_weights and is_shared and is_divided_weight(name)


@dataclass(frozen=True)
class GatheredLayers:
    """Elements of the divided weights of one layer.

    Attributes:
        teacher: those of the teacher; 0 without one.
        shared: the teacher's weights that the student has too.
        student: those that only the student has.
    """

    teacher: int = 0
    shared: int = 0
    student: int = 0

    @property
    def forward(self) -> int:
        """The elements that exist during the forward pass."""
        return _AT_ONCE * (self.teacher + self.student)

    @property
    def backward(self) -> int:
        """The elements that exist during the backward pass."""
        return _AT_ONCE * (self.shared + self.student) + self.teacher - self.shared

    @property
    def between_steps(self) -> int:
        """The elements that exist between steps and during the update."""
        return self.teacher + self.student


def gathered_layers(
    slices: Mapping[str, ParameterSlice],
    parallel: ParallelConfig,
    layout: RankLayout,
    of_student: Collection[str],
    has_teacher: bool,
) -> GatheredLayers:
    """Return what is gathered for the largest layer.

    Args:
        slices: this rank's slices, by name.
        of_student: the weights that are not the teacher's in the student.
        has_teacher: whether there is a teacher.
    """
    layers: dict[int | None, list[int]] = {None: [0, 0]}
    for name, held in slices.items():
        if has_rows_of(name, held, parallel, layout):
            sums = layers.setdefault(ParameterName.parse(name).layer, [0, 0])
            sums[name in of_student] += prod(held.local_shape)
    shared, student = max(layers.values(), key=sum)
    if not has_teacher:
        return GatheredLayers(student=shared + student)
    return GatheredLayers(shared + student, shared, student)
