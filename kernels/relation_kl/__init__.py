"""The exact relation KL of LinearARD in linear memory: values, gradients and mergeable partials.

``op`` has the public operations, ``mask`` the masks, ``statistics`` the sums of a row and how they
merge. ``backends`` lists the implementations: ``hopper`` (Gluon), ``triton`` and
``torch_reference``.
"""

from .backends import describe_kernels
from .mask import (
    IntervalMask,
    causal_mask,
    chunk_mask,
    document_mask,
    full_mask,
    places_mask,
    segment_bounds,
    segment_mask,
)
from .op import relation_backward, relation_forward, relation_kl, relation_partials
from .statistics import Partials, RelationStatistics, finish, merge, rescale

__all__ = [
    "IntervalMask",
    "Partials",
    "RelationStatistics",
    "causal_mask",
    "chunk_mask",
    "describe_kernels",
    "document_mask",
    "finish",
    "full_mask",
    "merge",
    "places_mask",
    "relation_backward",
    "relation_forward",
    "relation_kl",
    "relation_partials",
    "rescale",
    "segment_bounds",
    "segment_mask",
]
