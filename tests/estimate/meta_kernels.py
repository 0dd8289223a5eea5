"""Stand-ins for kernels and collectives on torch's meta device: what they allocate and save.

A GPU computes attention, the relations, RoPE, SwiGLU and norms with fused kernels. Their stand-ins
return and save tensors of the same shapes, and compute nothing. Everything else of a step is the
trainer's code.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megalard.distill import forward_gradient, student
from megalard.distill.terms import sharded_relations
from megalard.kernels.relation_kl import Partials, RelationStatistics
from megalard.model import attention, layers, merged_attention
from megalard.parallel import collectives
from megalard.parallel.context import attention as context_attention
from megalard.parallel.context import exchange
from megalard.training import step
from megalard.training.masters.bucket import Bucket

_TILE_COLUMNS = 128  # the column buffer of the Hopper kernels has whole tiles


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in place of kernels and collectives."""

    def put(module, **names) -> None:
        for name, value in names.items():
            monkeypatch.setattr(module, name, value)

    put(layers, swiglu=_Swiglu.apply, apply_rope=_Rope.apply)
    put(attention, _causal=lambda q, k, v, window: _Attention.apply(q, k, v))
    for module in (merged_attention, context_attention):
        put(module, attention_part=_part, attention_part_backward=_part_backward, merge=_merge)
    put(F, rms_norm=lambda x, shape, weight, eps: _Norm.apply(x, weight))
    put(forward_gradient, scaled=lambda x, factor: torch.empty_like(x))
    put(student, initial_a=lambda rank, features, seed: torch.empty(rank, features))
    put(step, make_optimizer=lambda *arguments: None)
    put(
        sharded_relations,
        relation_forward=_relation_forward,
        relation_partials=_relation_partials,
        relation_backward=_relation_backward,
        merge=lambda merged, partials: merged,
        rescale=lambda p, m_s, m_t: Partials(m_s, *(torch.empty_like(p.a) for _ in range(4))),
        finish=lambda p: RelationStatistics(*(torch.empty_like(p.a) for _ in range(3))),
    )
    put(sharded_relations.RelationPlan, _make_mask=lambda self, task, start, end: None)
    nothing = _Done()
    put(
        collectives,
        _all_gather=lambda out, x, group=None, async_op=False: nothing,
        _reduce_scatter=lambda out, x, group=None, async_op=False: nothing,
    )
    put(dist, all_reduce=lambda *arguments, **options: None)
    put(
        Bucket,
        _in_host_memory=lambda self, flat: torch.empty(flat.shape, dtype=flat.dtype),
        give_gradient=_give_gradient,
    )
    put(exchange.Exchange, __init__=_start_exchange)


_real_give_gradient = Bucket.give_gradient


def _give_gradient(bucket: Bucket) -> None:
    """Copy nothing from the meta device to host memory."""
    if bucket.master.device.type == "meta":
        _real_give_gradient(bucket)


class _Done:
    def wait(self) -> None:
        pass


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad), None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        root = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, weight, root)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = _part(q, k, v, True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        return _part_backward(grad, q, out, lse, k, v, True)


def _part(q, k, v, causal):
    return torch.empty_like(q), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)


def _part_backward(grad, q, out, lse, k, v, causal):
    return tuple(map(torch.empty_like, (q, k, v)))


def _merge(out, lse, other, other_lse):
    return torch.empty_like(out), torch.empty_like(lse)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:3], dtype=torch.float32)


def _relation_forward(rows_s, rows_t, cols_s=None, cols_t=None, *, mask):
    return RelationStatistics(*(_rows(rows_s) for _ in range(3)))


def _relation_partials(rows_s, rows_t, cols_s=None, cols_t=None, *, mask):
    return Partials(*(_rows(rows_s) for _ in range(5)))


def _relation_backward(rows_s, rows_t, cols_s, cols_t, lse_s, lse_t, weight, *, mask, out_dtype):
    """Allocate as ``kernels.relation_kl.hopper.backward.hopper_backward`` does."""
    grad = torch.empty_like(rows_s, dtype=out_dtype)
    batch, heads, _, dim = rows_s.shape
    columns = (rows_s if cols_s is None else cols_s).shape[2]
    tiles = -(-columns // _TILE_COLUMNS)
    buffer = rows_s.new_empty(batch, heads, tiles * _TILE_COLUMNS, dim, dtype=torch.float32)
    if cols_s is None:
        return grad
    del buffer
    return grad, rows_s.new_empty(cols_s.shape, dtype=out_dtype)


def _start_exchange(self, tensors, recipient, source, axis):
    self._received = [torch.empty_like(x) for x in tensors]
    self._sent, self._requests, self.sent_bytes = tensors, [], 0
