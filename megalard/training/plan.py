"""Check a configuration against its models, before any weight or text is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megalard.checkpoint.companions import Companion, for_window, tokenizer_companions
from megalard.checkpoint.open import StoredModel, open_model
from megalard.config.schema import CheckpointConfig, Config, StreamConfig
from megalard.data.sampler import check_global_batch
from megalard.data.tokenizer import Tokenizer, load_tokenizer
from megalard.distill.objective import reaches_of
from megalard.errors import UserError
from megalard.model.export_config import export_config
from megalard.model.rope import rope_table, scaled_config, window_of
from megalard.model.spec import ModelSpec, spec_from_config
from megalard.parallel.agreement import checked_on_all_ranks
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import Mesh
from megalard.parallel.tensor.slices import check_divisible
from megalard.training.origins import Origins
from megalard.training.trackers import check_installed


@dataclass(frozen=True)
class Plan:
    """The models of a run, opened once.

    Attributes:
        teacher: the teacher.
        source: the model whose weights the student starts from; often the teacher.
        student: the shape of the student.
        student_config: the ``config.json`` that the student is saved with.
        native_window: M in tokens.
        tokenizer: the tokenizer of the text.
    """

    teacher: StoredModel
    source: StoredModel
    student: ModelSpec
    student_config: dict
    native_window: int
    tokenizer: Tokenizer

    @property
    def factor(self) -> float:
        """The student's window divided by the native window."""
        return self.student.max_positions / self.native_window

    @property
    def origins(self) -> Origins:
        """The models as a checkpoint notes them."""
        return Origins(self.source, None if self.source is self.teacher else self.teacher)

    @property
    def companions(self) -> tuple[Companion, ...]:
        """The files that are written next to every save: tokenizer and generation files."""
        files = (*tokenizer_companions(self.tokenizer.directory), *self.source.generation_config)
        return for_window(files, self.native_window, self.student.max_positions)


def make_plan(config: Config, mesh: Mesh) -> Plan:
    """Open the models of a run and check the configuration against them.

    Raises:
        UserError: on every rank, for anything that cannot work.
    """
    with checked_on_all_ranks(mesh.world):
        if mesh.is_rank_0:
            check_installed(config.run.trackers)
        teacher = open_model(config.model.teacher)
        source = open_model(config.model.student) if config.model.student else teacher
        native_window = _native_window(config, teacher)
        check_divisible(teacher.spec, mesh.tp.size)
        if config.rope.type == "checkpoint":
            window = window_of(source.spec, native_window)
            student_config = export_config(source.spec, window=window)
        else:
            student_config = scaled_config(source.spec, config.rope, native_window, teacher.spec)
        student = spec_from_config(student_config, str(source.directory))
        check_divisible(student, mesh.tp.size)
        rope_table(student)
        _check_rounding(config.checkpoint, source)
        check_division(config, mesh)
        for stage, stage_config in config.all_stages().items():
            for name, stream in stage_config.all_streams().items():
                with naming_stream(name, stage_config, stage):
                    check_stream(stream, native_window, student, mesh)
        directory = config.model.tokenizer
        tokenizer = load_tokenizer(directory) if directory else teacher.tokenizer
    return Plan(teacher, source, student, student_config, native_window, tokenizer)


def check_division(config: Config, mesh: Mesh) -> None:
    """Refuse to divide weights that one rank holds alone."""
    if config.parallel.shard_weights and mesh.data.size == 1:
        raise UserError(
            "parallel.shard_weights divides weights over dp and cp ranks, and this run has one: "
            "leave it out, or start more processes (launch/train.sh --gpus N)"
        )


def _check_rounding(settings: CheckpointConfig, source: StoredModel) -> None:
    """Refuse stochastic rounding if nothing is rounded."""
    is_fp32 = source.weights.dtype("model.layers.0.self_attn.q_proj.weight") == torch.float32
    if settings.export_rounding != "nearest" and settings.export_dtype == "source" and is_fp32:
        raise UserError(
            f"checkpoint.export_rounding {settings.export_rounding} rounds to 16 bits, and the "
            f"files of {source.directory} are float32: set checkpoint.export_dtype bfloat16, or "
            "leave it out"
        )


def _native_window(config: Config, teacher: StoredModel) -> int:
    """Return M: the teacher's own window, unless the configuration gives a shorter one."""
    window, given = window_of(teacher.spec), config.model.native_context
    if given is not None and given > window:
        raise UserError(
            f"model.native_context is {given}, but {teacher.directory} reads {window} positions: "
            "leave it out, or give a shorter window"
        )
    return given or window


@contextmanager
def naming_stream(stream: str, config: Config, stage: str = "main") -> Iterator[None]:
    """Name stage and stream in an error of the block, if there are several of them.

    Args:
        stream: its name.
        config: the configuration of the stage.
        stage: the name of the stage; ``main`` in a run without stages.
    """
    try:
        yield
    except UserError as error:
        names = [f"stage {stage}"] if stage != "main" else []
        names += [f"stream {stream}"] if config.streams else []
        if not names:
            raise
        raise type(error)(f"{', '.join(names)}: {error}") from None


def check_stream(stream: StreamConfig, native_window: int, student: ModelSpec, mesh: Mesh) -> None:
    """Refuse a stream that the models cannot read or the ranks cannot share.

    Raises:
        UserError: the stream does not fit.
    """
    length, student_window = stream.data.context_length, student.max_positions
    if stream.objective.needs_teacher and length > native_window:
        raise UserError(
            f"data.context_length {length} is longer than the teacher's native window, beyond "
            f"which it has nothing to teach: use at most {native_window}"
        )
    if length > student_window:
        raise UserError(
            f"data.context_length {length} is longer than the student's window: use at most "
            f"{student_window}, or raise rope.factor"
        )
    SequenceShard(length, mesh.cp)  # refuses a length that the cp ranks cannot share
    check_global_batch(stream.global_batch, mesh.dp.size, stream.micro_batch)
    reaches_of(stream.objective, student.num_layers)
