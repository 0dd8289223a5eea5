"""From a configuration to what a run is made of: models, data, evaluation text."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from megalard.checkpoint.build import load_decoder
from megalard.checkpoint.open import check_recorded_sums, open_weights
from megalard.checkpoint.provenance import Origins
from megalard.checkpoint.weights import Weights
from megalard.config.schema import Config, StreamConfig, to_dict
from megalard.data.blocks import Blocks, DocumentBlocks, PackedBlocks
from megalard.data.loader import BatchLoader, StreamLoaders
from megalard.data.sampler import check_global_batch
from megalard.data.token_file import build_store
from megalard.data.token_store import META, TokenStore
from megalard.data.tokenizer import Tokenizer, load_tokenizer
from megalard.distill.reach import reach_of
from megalard.distill.student import Student, build_student
from megalard.errors import UserError
from megalard.files.locks import hold
from megalard.model.decoder import Decoder
from megalard.model.rope import rope_table, scaled_config, write_rope
from megalard.model.spec import ModelSpec, read_spec, spec_from_config
from megalard.parallel.agreement import checked_meanwhile, checked_on_all_ranks, gather_objects
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import Mesh
from megalard.parallel.tensor.layout import check_divisible
from megalard.training.resume import Output, find_output


@dataclass(frozen=True)
class Plan:
    """What is known of the models before any weight is read.

    Attributes:
        teacher, student: their specs.
        student_config: ``config.json`` the student is saved with.
        native_context: M in tokens.
        tokenizer: the model's own.
    """

    teacher: ModelSpec
    student: ModelSpec
    student_config: dict
    native_context: int
    tokenizer: Tokenizer

    @property
    def factor(self) -> float:
        """The student's window over the native one."""
        return self.student.max_positions / self.native_context


def make_plan(config: Config, mesh: Mesh) -> Plan:
    """Check the configuration against the models' config files.

    Raises:
        UserError: on every rank, for anything that cannot work.
    """
    with checked_on_all_ranks(mesh.world):
        teacher = read_spec(config.model.teacher)
        native = config.model.native_context or teacher.max_positions
        check_divisible(teacher, mesh.tp.size)
        start = read_spec(config.model.student) if config.model.student else teacher
        if config.rope.type == "checkpoint":
            student_config = write_rope(start.hf_config, start.rope, start.head_dim)
        else:
            student_config = scaled_config(start, config.rope, native)
        student = spec_from_config(student_config, config.model.student or config.model.teacher)
        check_divisible(student, mesh.tp.size)
        for name, stream in config.all_streams().items():
            with _naming(name, config):
                _check_stream(stream, native, student, mesh)
        tokenizer = load_tokenizer(config.model.tokenizer or config.model.teacher)
        # opened and closed again: a missing or truncated file is told before the text is tokenized
        for directory in filter(None, (config.model.teacher, config.model.student)):
            open_weights(directory)
    return Plan(teacher, student, student_config, native, tokenizer)


@contextmanager
def _naming(stream: str, config: Config) -> Iterator[None]:
    """Say of which stream an error speaks, where there are several."""
    try:
        yield
    except UserError as error:
        if not config.streams:
            raise
        raise type(error)(f"stream {stream}: {error}") from None


def _check_stream(stream: StreamConfig, native: int, student: ModelSpec, mesh: Mesh) -> None:
    """Refuse a stream that the models or the ranks cannot read."""
    length, window = stream.data.context_length, student.max_positions
    if stream.objective.needs_teacher and length > native:
        raise UserError(
            f"data.context_length {length} is longer than the teacher's native window, beyond "
            f"which it has nothing to teach: use at most {native}"
        )
    if length > window:
        raise UserError(
            f"data.context_length {length} is longer than the student's window: use at most "
            f"{window}, or raise rope.factor"
        )
    rows = stream.micro_batch * SequenceShard(length, mesh.cp).own_length
    if rows % mesh.tp.size:
        raise UserError(
            f"a micro-batch gives each cp rank {rows} tokens, which parallel.tp {mesh.tp.size} "
            "does not divide: choose a context length that it divides"
        )
    check_global_batch(stream.global_batch, mesh.dp.size, stream.micro_batch)
    reach_of(stream.objective, student.num_layers)


@contextmanager
def prepare_output(config: Config, mesh: Mesh) -> Iterator[Output]:
    """Make the output directory, or find the run in it to go on with; a collective call.

    Until the block ends no other process may run there.

    Raises:
        UserError: on every rank; see ``find_output``, the directory cannot be written, or another
            process runs there.
    """
    output = find_output(config, mesh)
    with ExitStack() as held:
        with checked_on_all_ranks(mesh.world):
            if mesh.world.rank == 0:
                held.enter_context(_claim(output, config))
        # another process may have saved between the look and the lock
        yield output if output.fresh else find_output(config, mesh)


def _claim(output: Output, config: Config) -> IO[bytes]:
    note = output.directory / "run.json"
    try:
        output.directory.mkdir(parents=True, exist_ok=True)
        file = hold(note, f"to run.output {output.directory}")
        if note.stat().st_size == 0:
            note.write_text(json.dumps(to_dict(config), indent=2) + "\n")
        elif output.fresh:
            file.close()
            raise UserError(
                f"another process has begun a run in run.output {output.directory}: start this "
                "command again to go on with it, or choose another directory"
            )
    except OSError as error:
        raise UserError(
            f"cannot write to run.output {output.directory}: {error.strerror}"
        ) from None
    return file


@contextmanager
def undone_on_error(output: Output, mesh: Mesh) -> Iterator[None]:
    """Empty a new run's output directory again if the block finds bad input.

    The block must write no results yet. A run that is corrected may then use the same directory.
    """
    try:
        yield
    except UserError:
        if mesh.world.rank == 0 and output.fresh:
            for entry in output.directory.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        raise


def load_models(config: Config, plan: Plan, mesh: Mesh) -> tuple[Decoder | None, Student, Origins]:
    """The frozen teacher, the student, and the files they are from; a collective call.

    The teacher is None where nothing compares with it: neither a stream nor the evaluation. Where
    the files' checksums are recorded (a sharded checkpoint, a run's) they are compared meanwhile.

    Raises:
        UserError: on every rank, when a tensor is missing or of another shape, or a file damaged.
    """
    dtype = getattr(torch, config.model.compute_dtype)

    def check() -> None:
        for directory in filter(None, (config.model.teacher, config.model.student)):
            check_recorded_sums(directory, mesh.world)

    with checked_meanwhile(check, mesh.world) as wait_for_checksums:
        with checked_on_all_ranks(mesh.world):
            weights = open_weights(config.model.teacher)
            rope = rope_table(plan.teacher)
            teacher = load_decoder(plan.teacher, rope, mesh.tp, weights, mesh.device, dtype)
            own = open_weights(config.model.student) if config.model.student else None
            rope = rope_table(plan.student)
            student = build_student(
                teacher, plan.student, rope, config, mesh.tp, own, masters=own or weights
            )
        wait_for_checksums()
    compared = any(stream.objective.needs_teacher for stream in config.all_streams().values())
    needed = compared or config.evaluation.paths
    origins = Origins(own, teacher=weights) if own else Origins(weights)
    return teacher if needed else None, student, origins


def open_streams(
    config: Config, folder: Path, plan: Plan, mesh: Mesh, only_reuse: bool = False
) -> dict[str, TokenStore]:
    """Every stream's tokens; streams of the same text share a store.

    Args:
        folder: where tokens are kept that have no ``cache`` of their own.
        only_reuse: write to ``folder`` alone; a cache is used only if it is there.

    Raises:
        UserError: on every rank; see ``megalard.data``.
    """
    stores, opened, streams = {}, {}, config.all_streams()
    texts = {name: (*stream.data.paths, stream.data.text_key) for name, stream in streams.items()}
    for name, stream in streams.items():
        data = stream.data
        if (texts[name], data.cache) not in opened:
            cache = folder / (f"tokens-{name}" if config.streams else "tokens")
            if data.cache:
                others = {texts[n] for n, s in streams.items() if s.data.cache == data.cache}
                own = Path(data.cache) / (name if len(others) > 1 else "")
                cache = cache if only_reuse and not own.exists() else own
            with _naming(name, config):
                store = open_tokens(data.paths, cache, data.text_key, plan, mesh)
            opened[texts[name], data.cache] = store
        stores[name] = opened[texts[name], data.cache]
    return stores


def open_tokens(paths: list[str], cache: Path, text_key: str, plan: Plan, mesh: Mesh) -> TokenStore:
    """Tokenize text, or open one prepared directory; every rank maps the same store.

    The first process of every node builds the store. Where nodes share the directory the first to
    finish provides it and the others open that.

    Raises:
        UserError: on every rank; see ``megalard.data``.
    """
    prepared = Path(paths[0])
    if len(paths) == 1 and (prepared / META).is_file():
        cache = prepared
    else:
        with checked_on_all_ranks(mesh.world):
            if first_on_node():
                build_store(paths, plan.tokenizer, cache, text_key=text_key)
    with checked_on_all_ranks(mesh.world):
        store = TokenStore.open(cache)
        store.check_tokenizer(plan.tokenizer)
        store.check_vocabulary(plan.teacher.vocab_size)
    return store


def make_loaders(
    config: Config, stores: dict[str, TokenStore], plan: Plan, mesh: Mesh
) -> StreamLoaders:
    """The loaders of this rank's micro-batches, a stream each."""
    loaders = {}
    with checked_on_all_ranks(mesh.world):
        for name in config.all_streams():
            with _naming(name, config):
                loaders[name] = _make_loader(config, name, stores[name], plan, mesh)
    return StreamLoaders(loaders)


def _make_loader(
    config: Config, name: str, store: TokenStore, plan: Plan, mesh: Mesh
) -> BatchLoader:
    stream = config.all_streams()[name]
    kind = PackedBlocks if stream.data.packing else DocumentBlocks
    blocks: Blocks = kind(store, stream.data.context_length)
    return BatchLoader(
        blocks,
        seed=config.stream_seed(name),
        global_batch=stream.global_batch,
        micro_batch=stream.micro_batch,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        cp=mesh.cp,
        window=plan.student.max_positions,
        positions=stream.data.positions,
    )


def first_on_node() -> bool:
    """Whether this is the process that does what one process of each node has to do."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def companions(plan: Plan, source: Weights) -> list[Path]:
    """The files copied beside every save: the tokenizer's, and how to generate."""
    generation = source.directory / "generation_config.json"
    return [*plan.tokenizer.files, *([generation] if generation.is_file() else [])]


@contextmanager
def scratch_folder(mesh: Mesh) -> Iterator[Path]:
    """A temporary folder of one name on every node, removed at the end; a collective call."""
    name = gather_objects(f"megalard-{secrets.token_hex(8)}", mesh.world)[0]
    folder = Path(tempfile.gettempdir()) / name
    try:
        yield folder
        if mesh.world.size > 1:
            dist.barrier(group=mesh.world.group)
    finally:
        if first_on_node():
            shutil.rmtree(folder, ignore_errors=True)
