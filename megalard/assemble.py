"""From a configuration to what a run is made of: models, data, evaluation text."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megalard.checkpoint.load import load_decoder
from megalard.checkpoint.merged import Weights
from megalard.checkpoint.source import open_weights
from megalard.config import Config, to_dict
from megalard.data.blocks import Blocks, DocumentBlocks, PackedBlocks
from megalard.data.loader import BatchLoader
from megalard.data.sampler import check_global_batch
from megalard.data.token_file import build_store
from megalard.data.token_store import META, TokenStore
from megalard.data.tokenizer import Tokenizer, load_tokenizer
from megalard.distill.student import Student, build_student, last_layer_needed
from megalard.errors import UserError
from megalard.model.decoder import Decoder
from megalard.model.rope import rope_table, scaled_config, write_rope
from megalard.model.spec import ModelSpec, read_spec, spec_from_config
from megalard.parallel.agreement import checked_on_all_ranks, gather_objects
from megalard.parallel.context import SequenceShard
from megalard.parallel.layout import check_divisible
from megalard.parallel.mesh import Mesh
from megalard.resume import Output, find_output


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
        if config.data.context_length > native:
            raise UserError(
                f"data.context_length {config.data.context_length} is longer than the teacher's "
                f"native window, beyond which it has nothing to teach: use at most {native}"
            )
        shard = SequenceShard(config.data.context_length, mesh.cp)
        rows = config.optimizer.micro_batch * shard.own_length
        if rows % mesh.tp.size:
            raise UserError(
                f"a micro-batch gives each cp rank {rows} tokens, which parallel.tp {mesh.tp.size} "
                "does not divide: choose a context length that it divides"
            )
        optimizer = config.optimizer
        check_global_batch(optimizer.global_batch, mesh.dp.size, optimizer.micro_batch)
        check_divisible(teacher, mesh.tp.size)
        last_layer_needed(config, teacher.num_layers)
        start = read_spec(config.model.student) if config.model.student else teacher
        if config.rope.type == "checkpoint":
            student_config = write_rope(start.hf_config, start.rope, start.head_dim)
        else:
            student_config = scaled_config(start, config.rope, native)
        student = spec_from_config(student_config, config.model.student or config.model.teacher)
        check_divisible(student, mesh.tp.size)
        tokenizer = load_tokenizer(config.model.tokenizer or config.model.teacher)
        # opened and closed again: a missing or truncated file is told before the text is tokenized
        for directory in filter(None, (config.model.teacher, config.model.student)):
            open_weights(directory)
    return Plan(teacher, student, student_config, native, tokenizer)


def prepare_output(config: Config, mesh: Mesh) -> Output:
    """Make the output directory, or find the run in it to go on with; a collective call.

    Raises:
        UserError: on every rank; see ``find_output``, or the directory cannot be written.
    """
    output = find_output(config, mesh)
    with checked_on_all_ranks(mesh.world):
        if mesh.world.rank == 0 and output.fresh:
            text = json.dumps(to_dict(config), indent=2) + "\n"
            try:
                output.directory.mkdir(parents=True, exist_ok=True)
                (output.directory / "run.json").write_text(text)
            except OSError as error:
                raise UserError(
                    f"cannot write to run.output {output.directory}: {error.strerror}"
                ) from None
    return output


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


def load_models(config: Config, plan: Plan, mesh: Mesh) -> tuple[Decoder, Student, Weights]:
    """The frozen teacher, the student, and the files the student started from."""
    dtype = getattr(torch, config.model.compute_dtype)
    with checked_on_all_ranks(mesh.world):
        weights = open_weights(config.model.teacher)
        rope = rope_table(plan.teacher)
        teacher = load_decoder(plan.teacher, rope, mesh.tp, weights, mesh.device, dtype)
        own = open_weights(config.model.student) if config.model.student else None
        rope = rope_table(plan.student)
        student = build_student(
            teacher, plan.student, rope, config, mesh.tp, own, masters=own or weights
        )
    return teacher, student, own or weights


def open_tokens(
    paths: list[str], cache: Path, config: Config, plan: Plan, mesh: Mesh
) -> TokenStore:
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
                build_store(paths, plan.tokenizer, cache, text_key=config.data.text_key)
    with checked_on_all_ranks(mesh.world):
        store = TokenStore.open(cache)
        store.check_tokenizer(plan.tokenizer)
        store.check_vocabulary(plan.teacher.vocab_size)
    return store


def make_loader(config: Config, store: TokenStore, mesh: Mesh) -> BatchLoader:
    """The loader of this rank's micro-batches."""
    with checked_on_all_ranks(mesh.world):
        kind = PackedBlocks if config.data.packing else DocumentBlocks
        blocks: Blocks = kind(store, config.data.context_length)
        return BatchLoader(
            blocks,
            seed=config.run.seed,
            global_batch=config.optimizer.global_batch,
            micro_batch=config.optimizer.micro_batch,
            dp_rank=mesh.dp.rank,
            dp_size=mesh.dp.size,
            cp=mesh.cp,
        )


def first_on_node() -> bool:
    """Whether this is the process that does what one process of each node has to do."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def tokens_a_step(config: Config) -> int:
    """Tokens of one optimizer step, over all ranks."""
    return config.optimizer.global_batch * config.data.context_length


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
