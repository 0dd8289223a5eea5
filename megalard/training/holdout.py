"""Take a small part of the training text aside for evaluation, if no held-out text is given."""

from __future__ import annotations

import numpy as np

from megalard.checkpoint.sharded.manifest import read_manifest
from megalard.config.schema import Config
from megalard.data.token_store import TokenStore
from megalard.training.output import Output
from megalard.training.plan import Plan

# The largest share of the text that is taken aside.
_SHARE = 50


def split_holdout(
    stores: dict[str, TokenStore], config: Config, plan: Plan, output: Output
) -> tuple[dict[str, TokenStore], np.ndarray | None]:
    """Split the end of the text of the first stream off, for evaluation.

    A run that is resumed keeps the split that it began with, whatever the configuration says now.

    Returns:
        The stores without the part that is taken aside, and that part, int64 [tokens]; None if
        nothing is taken aside.
    """
    name = next(iter(stores))
    store = stores[name]
    total = len(store.tokens)
    if output.checkpoint is not None:
        data = read_manifest(output.checkpoint).training["data"]
        saved_tokens = data.get(name, {}).get("tokens", total)
        count = max(0, total - saved_tokens)
    else:
        count = _count(config, plan, name, total)
    if count == 0:
        return stores, None
    training = store.head(total - count)
    split = {key: training if other is store else other for key, other in stores.items()}
    return split, store.read(total - count, total)


def _count(config: Config, plan: Plan, name: str, total: int) -> int:
    """Return how many tokens a new run takes aside."""
    evaluation, stream = config.evaluation, config.all_streams()[name]
    if evaluation.paths:
        return 0
    count = min(evaluation.holdout, total // _SHARE)
    enough_blocks = (total - count) // stream.data.context_length >= stream.global_batch
    # Less than one native window says too little about short text.
    return count if count >= plan.native_window and enough_blocks else 0
