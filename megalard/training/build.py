"""Build the parts of a run from its plan: models, tokens and loaders."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megalard.checkpoint.build import load_decoder
from megalard.config.schema import Config, DataConfig
from megalard.data.blocks import Blocks, DocumentBlocks, PackedBlocks
from megalard.data.boundaries import Boundaries, boundaries_of
from megalard.data.loader import BatchLoader, StreamLoaders
from megalard.data.token_store import META, TokenStore
from megalard.data.token_store_writer import build_store
from megalard.distill.objective import is_reached
from megalard.distill.student import Student, build_student
from megalard.model.decoder import Decoder
from megalard.model.rope import rope_table
from megalard.parallel.agreement import checked_meanwhile, checked_on_all_ranks
from megalard.parallel.mesh import Mesh, is_first_on_node
from megalard.reporter import Reporter
from megalard.training.plan import Plan, naming_stream


def load_models(
    config: Config, plan: Plan, mesh: Mesh, keep_teacher: bool
) -> tuple[Decoder | None, Student]:
    """Load the frozen teacher and the student; a collective call.

    Checksums that the models record (as sharded checkpoints do) are compared meanwhile.

    Args:
        keep_teacher: whether the teacher is returned although no stream compares with it.

    Returns:
        The teacher, or None if it is not needed, and the student.

    Raises:
        UserError: on every rank, if a tensor is missing or has another shape, or a file is damaged.
    """
    dtype = getattr(torch, config.model.compute_dtype)
    streams = config.all_streams()
    teacher_model, source = plan.teacher, plan.source
    has_own_weights = source is not teacher_model

    def check() -> None:
        teacher_model.check_sums(mesh.world)
        if has_own_weights:
            source.check_sums(mesh.world)

    with checked_meanwhile(check, mesh.world) as wait_for_checksums:
        with checked_on_all_ranks(mesh.world):
            teacher = load_decoder(
                teacher_model.spec,
                rope_table(teacher_model.spec),
                mesh.tp,
                teacher_model.weights,
                mesh.device,
                dtype,
            )
            student = build_student(
                teacher,
                plan.student,
                rope_table(plan.student),
                mesh.tp,
                config.trainable,
                partial(is_reached, streams=streams, num_layers=plan.student.num_layers),
                config.run.seed,
                weights=source.weights if has_own_weights else None,
                masters=source.weights,
            )
        wait_for_checksums()
    is_needed = keep_teacher or any(s.objective.needs_teacher for s in streams.values())
    return teacher if is_needed else None, student


def open_streams(
    config: Config,
    folder: Path,
    plan: Plan,
    mesh: Mesh,
    read_only: bool = False,
    is_resumed: bool = False,
) -> dict[str, TokenStore]:
    """Open the tokens of every stream. Streams of the same text share a store.

    Args:
        folder: where tokens are kept that have no ``cache``.
        read_only: write to ``folder`` alone, and use a cache only if it exists.
        is_resumed: whether a run goes on, which keeps a store of an earlier version as it is.

    Raises:
        UserError: on every rank; see ``megalard.data``.
    """
    stores: dict[str, TokenStore] = {}
    opened: dict[tuple, TokenStore] = {}
    streams = config.all_streams()
    texts = {name: _text_of(stream.data) for name, stream in streams.items()}
    for name, stream in streams.items():
        data = stream.data
        if (texts[name], data.cache) not in opened:
            directory = folder / (f"tokens-{name}" if config.streams else "tokens")
            if data.cache:
                texts_in_cache = {
                    texts[n] for n, s in streams.items() if s.data.cache == data.cache
                }
                cache = Path(data.cache) / (name if len(texts_in_cache) > 1 else "")
                directory = directory if read_only and not cache.exists() else cache
            with naming_stream(name, config):
                store = open_tokens(data.paths, directory, data, plan, mesh, is_resumed)
            opened[texts[name], data.cache] = store
        stores[name] = opened[texts[name], data.cache]
    return stores


def _text_of(data: DataConfig) -> tuple:
    """Return what determines the tokens of a stream."""
    return (*data.paths, data.text_key, data.bos, data.eos, data.end_token)


def open_tokens(
    paths: list[str],
    directory: Path,
    data: DataConfig,
    plan: Plan,
    mesh: Mesh,
    is_resumed: bool = False,
) -> TokenStore:
    """Tokenize text into ``directory``, or open one prepared directory; a collective call.

    The first process of every node builds the store, and every rank maps it. If nodes share the
    directory, the first node to finish provides it and the others open it.

    Args:
        data: how the text is read.
        is_resumed: as for ``open_streams``.

    Raises:
        UserError: on every rank; see ``megalard.data``.
    """
    prepared = Path(paths[0])
    with checked_on_all_ranks(mesh.world):
        boundaries = boundaries_of(plan.tokenizer, data.bos, data.eos, data.end_token)
    if len(paths) == 1 and (prepared / META).is_file():
        directory = prepared
    else:
        with checked_on_all_ranks(mesh.world):
            if is_resumed and (directory / META).is_file():
                boundaries = _boundaries_of_earlier_version(directory) or boundaries
            if is_first_on_node():
                build_store(
                    paths,
                    plan.tokenizer,
                    directory,
                    text_key=data.text_key,
                    boundaries=boundaries,
                    warn=Reporter(mesh.is_rank_0).warning,
                )
    with checked_on_all_ranks(mesh.world):
        store = TokenStore.open(directory)
        store.check_tokenizer(plan.tokenizer)
        store.check_vocabulary(plan.teacher.spec.vocab_size)
        if not (is_resumed and store.version == 1):
            store.check_boundaries(boundaries)
    return store


def _boundaries_of_earlier_version(directory: Path) -> Boundaries | None:
    """Return the special tokens of a store of version 1, with which a run goes on."""
    store = TokenStore.open(directory)
    return store.boundaries if store.version == 1 else None


def make_loaders(
    config: Config, stores: dict[str, TokenStore], plan: Plan, mesh: Mesh
) -> StreamLoaders:
    """Return the loaders of this rank's micro-batches, one per stream.

    Raises:
        UserError: on every rank; see ``BatchLoader``.
    """
    loaders = {}
    with checked_on_all_ranks(mesh.world):
        for name in config.all_streams():
            with naming_stream(name, config):
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
