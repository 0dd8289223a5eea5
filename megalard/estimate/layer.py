"""What autograd keeps of one student layer until the backward pass.

Every line below names a tensor that some operation of ``megalard.model.layers`` and
``megalard.parallel.tensor.linear`` saves. ``tests/estimate`` compares the sums with the bytes that
the trainer's code allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalard.distill.reach import LayerDepth
from megalard.estimate.sizes import FP32_BYTES, Sizes
from megalard.estimate.trained import Trained
from megalard.model.names import OPERAND_MODULES

_QKV = frozenset(modules[0] for modules in OPERAND_MODULES.values())
_QK_NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class SavedLayer:
    """Bytes that one student layer saves, without its input, the residual.

    Attributes:
        projections: what precedes attention: the norm's output and LoRA's products.
        attention: q, the local k and v, the attention output and its log-sum-exps.
        gathered: k and v of the complete block, in place of the local k and v.
        rest: what follows attention.
        casts: weights that are trained, cast to the compute dtype.
    """

    projections: int
    attention: int
    gathered: int
    rest: int
    casts: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.projections + self.attention + self.gathered + self.rest + self.casts


def saved_layer(
    sizes: Sizes, trained: Trained, layer: int, depth: LayerDepth, dropout: bool
) -> SavedLayer:
    """Return what a layer that is computed as far as ``depth`` saves.

    Args:
        trained: the trained tensors.
        dropout: whether LoRA's inputs have dropout, so that they are separate tensors.
    """
    weights, pairs = trained.in_layer(layer), trained.lora_in_layer(layer)
    qkv_pairs = [module for module in pairs if module in _QKV]
    casts = _casts(sizes, trained, layer, depth)
    if layer == 0 and not trained.has_embedding:
        # The input needs no gradient, so that the A's of q, k and v are not kept for it.
        casts -= trained.rank * len(qkv_pairs) * sizes.spec.hidden_size * sizes.element
    projections = _projections(sizes, trained.rank, weights, qkv_pairs, dropout)
    if depth == LayerDepth.QKV:
        return SavedLayer(projections, 0, 0, 0, casts)
    attention = 2 * sizes.q + sizes.row_statistics
    gathered = 0
    if sizes.layout.cp == 1:
        attention += 2 * sizes.attended_k
    else:
        gathered = 2 * sizes.attended_k * sizes.layout.cp
    rest = _rest(sizes, trained, weights, pairs, dropout) if depth == LayerDepth.WHOLE else 0
    return SavedLayer(projections, attention, gathered, rest, casts)


def _projections(sizes: Sizes, rank: int, weights, pairs: list[str], dropout: bool) -> int:
    spec, is_split = sizes.spec, sizes.layout.tp > 1
    has_norm = spec.norms == "before"
    total = FP32_BYTES * sizes.rows if has_norm else 0
    if pairs:
        if has_norm or dropout:
            total += sizes.residual
        total += sizes.tokens * rank * len(pairs) * sizes.element
    if _QKV & weights.keys() and (has_norm or is_split):
        total += sizes.hidden
    if spec.qk_norm == "full" and is_split:
        # The norm over the features of all ranks keeps its input in fp32. If its weight is
        # trained, it also keeps the normalized input in fp32, before the product with the weight.
        for module, size in (("q_norm", sizes.q), ("k_norm", sizes.k)):
            copies = 2 if module in weights else 1
            total += copies * FP32_BYTES * size // sizes.element
    elif spec.qk_norm is not None:
        total += sizes.q + sizes.k + sizes.row_statistics * (1 if spec.qk_norm == "head" else 0)
    return total


def _rest(sizes: Sizes, trained: Trained, weights, pairs: list[str], dropout: bool) -> int:
    is_split, has_norm = sizes.layout.tp > 1, sizes.spec.norms == "before"
    total = 2 * sizes.gate
    # Before: the norm keeps its input, the residual after attention. After: both norms keep the
    # projections' outputs.
    total += (1 if has_norm else 2) * (sizes.residual + FP32_BYTES * sizes.rows)
    if "o_proj" in pairs:
        total += sizes.rows * trained.rank * sizes.element + (sizes.q if dropout else 0)
    if {"gate_proj", "up_proj"} & weights.keys():
        total += sizes.hidden if has_norm or is_split else sizes.residual
    if "down_proj" in weights:
        total += sizes.gate
    return total


def _casts(sizes: Sizes, trained: Trained, layer: int, depth: LayerDepth) -> int:
    """Return the bytes of casts of trained fp32 tensors, which matrix products keep."""
    spec, rank = sizes.spec, trained.rank

    def is_cast(module: str, kind: str = "weight") -> bool:
        return sizes.element < FP32_BYTES and not trained.is_divided(layer, module, kind)

    total = 0
    for module in trained.lora_in_layer(layer):
        is_column = module in _QKV
        if module == "o_proj" and depth != LayerDepth.WHOLE:
            continue
        heads = sizes.heads if module in ("q_proj", "o_proj") else sizes.kv_heads
        wide = heads * spec.head_dim
        a_features = spec.hidden_size if is_column else wide
        b_features = wide if is_column else spec.hidden_size
        # The A's of q, k and v are stacked, also where nothing is cast.
        if is_column or is_cast(module, "lora_A"):
            total += rank * a_features * sizes.element
        if is_cast(module, "lora_B"):
            total += rank * b_features * sizes.element
    late = () if depth == LayerDepth.WHOLE else ("o_proj", "gate_proj", "up_proj", "down_proj")
    for module, size in trained.in_layer(layer).items():
        if module not in late and is_cast(module):
            total += size * sizes.element
    return total
