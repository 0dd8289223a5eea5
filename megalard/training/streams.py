"""Open the text of a run: the tokens of every stream, and the loaders of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalard.config.schema import Config, DataConfig
from megalard.data.blocks import Blocks, DocumentBlocks, PackedBlocks
from megalard.data.boundaries import Boundaries
from megalard.data.chat import boundaries_of_format, column_of
from megalard.data.loader import BatchLoader, StreamLoaders
from megalard.data.token_store import META, TokenStore
from megalard.data.token_store_writer import build_store
from megalard.parallel.agreement import checked_on_all_ranks
from megalard.parallel.mesh import Mesh, is_first_on_node
from megalard.reporter import Reporter
from megalard.training.plan import Plan, naming_stream
from megalard.training.stages import Stage

Stores = dict[str, dict[str, TokenStore]]
"""The tokens of each stream, by stage and stream."""


def open_streams(
    stages: Sequence[Stage],
    folder: Path,
    plan: Plan,
    mesh: Mesh,
    read_only: bool = False,
    is_resumed: bool = False,
) -> Stores:
    """Open the tokens of every stream. Streams of the same text share a store.

    Args:
        folder: the directory for the tokens of streams without a ``cache``.
        read_only: whether nothing is written outside ``folder``; a cache is then used only if it
            exists.
        is_resumed: whether a run is resumed. It keeps a store of an earlier version as it is.

    Raises:
        UserError: on every rank; see ``megalard.data``.
    """
    stores: Stores = {}
    opened: dict[tuple, TokenStore] = {}
    streams = [
        (stage, name, stream.data)
        for stage in stages
        for name, stream in stage.config.all_streams().items()
    ]
    for stage, name, data in streams:
        key = (_text_of(data), data.cache)
        if key not in opened:
            parts = [
                *([stage.name] if len(stages) > 1 else []),
                *([name] if stage.config.streams else []),
            ]
            directory = folder / "-".join(["tokens", *parts])
            if data.cache:
                texts = {_text_of(other) for _, _, other in streams if other.cache == data.cache}
                cache = Path(data.cache) / ("-".join(parts) if len(texts) > 1 else "")
                directory = directory if read_only and not cache.exists() else cache
            with naming_stream(name, stage.config, stage.name):
                opened[key] = open_tokens(data.paths, directory, data, plan, mesh, is_resumed)
        stores.setdefault(stage.name, {})[name] = opened[key]
    return stores


def _text_of(data: DataConfig) -> tuple:
    """Return what determines the tokens of a stream."""
    weights, marks = tuple(data.weights or ()), (data.bos, data.eos, data.end_token)
    return (*data.paths, weights, data.format, data.text_key, *marks)


def open_tokens(
    paths: list[str],
    directory: Path,
    data: DataConfig,
    plan: Plan,
    mesh: Mesh,
    is_resumed: bool = False,
) -> TokenStore:
    """Tokenize text into ``directory``, or open the prepared store that ``paths`` names.

    This is a collective call.

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
        boundaries = boundaries_of_format(
            data.format, plan.tokenizer, data.bos, data.eos, data.end_token
        )
        column = column_of(data.format, data.text_key, plan.tokenizer)
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
                    column=column,
                    boundaries=boundaries,
                    weights=data.weights,
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
    """Return the special tokens of a store of version 1, which a resumed run keeps, or None."""
    store = TokenStore.open(directory)
    return store.boundaries if store.version == 1 else None


def make_loaders(stage: Stage, stores: Stores, plan: Plan, mesh: Mesh) -> StreamLoaders:
    """Return the loaders of this rank's micro-batches, one per stream of a stage.

    Raises:
        UserError: on every rank; see ``BatchLoader``.
    """
    loaders = {}
    with checked_on_all_ranks(mesh.world):
        for name in stage.config.all_streams():
            with naming_stream(name, stage.config, stage.name):
                store = stores[stage.name][name]
                loaders[name] = _make_loader(stage.config, name, store, plan, mesh)
    return StreamLoaders(loaders)


def _make_loader(
    config: Config, name: str, store: TokenStore, plan: Plan, mesh: Mesh
) -> BatchLoader:
    stream = config.all_streams()[name]
    length = stream.data.context_length
    blocks: Blocks
    if stream.data.packing:
        blocks = PackedBlocks(store, length)
    else:
        blocks = DocumentBlocks(store, length, min_tokens=length if stream.data.drop_tails else 2)
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
