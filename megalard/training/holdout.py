"""Take a small part of the training text aside for evaluation, if no held-out text is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalard.checkpoint.sharded.manifest import read_manifest
from megalard.data.boundaries import Boundaries
from megalard.data.token_store import TokenStore
from megalard.training.output import Output
from megalard.training.plan import Plan
from megalard.training.stages import Stage, data_key
from megalard.training.streams import Stores

# At most 1 / _SHARE of the text is taken aside.
_SHARE = 50


@dataclass(frozen=True)
class HeldOut:
    """A part of the training text that is only evaluated on.

    Attributes:
        tokens: int64 [tokens].
        boundaries: the special tokens around its documents.
    """

    tokens: np.ndarray
    boundaries: Boundaries


def split_holdout(
    stores: Stores, stages: Sequence[Stage], plan: Plan, output: Output
) -> tuple[Stores, HeldOut | None]:
    """Split the end of the text of the first stream off, for evaluation.

    A run that is resumed keeps the split that it began with, whatever the configuration says now.

    Returns:
        The stores without the part that is taken aside, and that part; None if nothing is taken
        aside.
    """
    stage = stages[0]
    name = next(iter(stage.config.all_streams()))
    store = stores[stage.name][name]
    total = len(store.tokens)
    if output.checkpoint is not None:
        data = read_manifest(output.checkpoint).training["data"]
        saved_tokens = data.get(data_key(stage, name), {}).get("tokens", total)
        count = max(0, total - saved_tokens)
    else:
        count = _count(stores, stages, plan, store)
    if count == 0:
        return stores, None
    training = store.head(total - count)
    split = {
        stage: {name: training if other is store else other for name, other in streams.items()}
        for stage, streams in stores.items()
    }
    return split, HeldOut(store.read(total - count, total), store.boundaries)


def _count(stores: Stores, stages: Sequence[Stage], plan: Plan, store: TokenStore) -> int:
    """Return how many tokens a new run takes aside."""
    evaluation, total = stages[0].config.evaluation, len(store.tokens)
    if evaluation.paths:
        return 0
    count = min(evaluation.holdout, total // _SHARE)
    has_enough_blocks = all(
        (total - count) // stream.data.context_length >= stream.global_batch
        for stage in stages
        for name, stream in stage.config.all_streams().items()
        if stores[stage.name][name] is store
    )
    # Less than one native window says too little about short text.
    return count if count >= plan.native_window and has_enough_blocks else 0
