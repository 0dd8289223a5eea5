"""Load the teacher, and build the student of each stage."""

from __future__ import annotations

from functools import partial

import torch

from megalard.checkpoint.build import empty_decoder, load_decoder
from megalard.config.schema import Config
from megalard.distill.objective import is_reached
from megalard.distill.student import Student, build_student, merged_weights
from megalard.model.decoder import Decoder
from megalard.model.rope import rope_table
from megalard.parallel.agreement import checked_meanwhile, checked_on_all_ranks
from megalard.parallel.divided_weights import WeightDivision
from megalard.parallel.mesh import Mesh
from megalard.parallel.tensor.slices import kv_replicas
from megalard.training.plan import Plan
from megalard.training.stages import Stage, first_with_same_parameters, weights_changed_before


def load_models(stage: Stage, plan: Plan, mesh: Mesh) -> tuple[Decoder, Student]:
    """Load the frozen teacher and the student of the first stage; a collective call.

    Checksums that the models record (as sharded checkpoints do) are compared meanwhile.

    Raises:
        UserError: on every rank, if a tensor is missing or has another shape, or a file is damaged.
    """
    source = plan.source
    has_other_weights = source is not plan.teacher

    def check() -> None:
        plan.teacher.check_sums(mesh.world)
        if has_other_weights:
            source.check_sums(mesh.world)

    division = division_of(stage.config, plan, mesh)
    with checked_meanwhile(check, mesh.world) as wait_for_checksums:
        with checked_on_all_ranks(mesh.world):
            teacher = _load_teacher(stage.config, plan, mesh, division)
            weights = source.weights if has_other_weights else None
            student = _build(stage, plan, mesh, teacher, division, weights=weights)
        wait_for_checksums()
    return teacher, student


def division_of(config: Config, plan: Plan, mesh: Mesh) -> WeightDivision | None:
    """Return how the ranks divide the weights, None if they do not; a collective call."""
    if not config.parallel.shard_weights:
        return None
    return WeightDivision(mesh, kv_replicas(plan.student, mesh.tp.size))


def load_teacher(config: Config, plan: Plan, mesh: Mesh) -> Decoder:
    """Load the frozen teacher; a collective call.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    return _load_teacher(config, plan, mesh, division_of(config, plan, mesh))


def next_student(before: Student, stage: Stage, plan: Plan, mesh: Mesh) -> Student:
    """Return the student of a stage, with the weights that the previous stage ended with.

    Unless the stage keeps the optimizer, the student of the previous stage cannot be used any more.
    """
    if stage.keeps_optimizer:
        return before
    earlier = merged_weights(before, plan.source.weights)
    before.release()
    division = division_of(stage.config, plan, mesh)
    return _build(stage, plan, mesh, before.decoder, division, earlier=earlier)


def student_to_restore(
    first: Student, stages: list[Stage], number: int, plan: Plan, mesh: Mesh
) -> Student:
    """Return the student of a stage, into which a checkpoint is loaded next.

    The weights that earlier stages changed are zero here, because the checkpoint has them.

    Args:
        first: the student of the first stage, whose unchanged weights are shared.
        number: the number of the stage, counted from 0.
    """
    start = first_with_same_parameters(stages, number)
    if start == 0:
        return first
    slices = empty_decoder(plan.student, rope_table(plan.student), mesh.tp).slices
    changed = weights_changed_before(stages, start, slices, plan.student.num_layers)
    earlier = {name: torch.zeros(slices[name].local_shape) for name in sorted(changed)}
    division = division_of(stages[start].config, plan, mesh)
    return _build(stages[start], plan, mesh, first.decoder, division, earlier=earlier)


def _load_teacher(
    config: Config, plan: Plan, mesh: Mesh, division: WeightDivision | None
) -> Decoder:
    model, dtype = plan.teacher, _dtype(config)
    rope = rope_table(model.spec)
    return load_decoder(model.spec, rope, mesh.tp, model.weights, mesh.device, dtype, division)


def _build(
    stage: Stage,
    plan: Plan,
    mesh: Mesh,
    start: Decoder,
    division: WeightDivision | None,
    **options,
) -> Student:
    config = stage.config
    reached = partial(is_reached, streams=config.all_streams(), num_layers=plan.student.num_layers)
    return build_student(
        start,
        plan.student,
        rope_table(plan.student),
        mesh.tp,
        config.trainable,
        reached,
        config.run.seed,
        masters=plan.source.weights,
        dtype=_dtype(config),
        division=division,
        **options,
    )


def _dtype(config: Config) -> torch.dtype:
    return getattr(torch, config.model.compute_dtype)
