"""The layers of a decoder: norms, attention, the MLP, and the orders in which families apply them.

The code is plain torch on local shapes. Everything that differs between one GPU and many is behind
the protocol ``Ops``, so that this file reads the same for both. Parameters have the names of
Hugging Face.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from megalard.model.fuse import fused_on_gpu
from megalard.model.norm import RmsNorm
from megalard.model.ops import Context, Ops, Qkv, without_padding
from megalard.model.projection import Projection
from megalard.model.rope import apply_rope
from megalard.model.spec import ModelSpec


class HeadNorm(RmsNorm):
    """A norm of each head, with one weight for all heads."""

    def __init__(self, head_dim: int, num_heads: int, eps: float):
        super().__init__(head_dim, eps)
        self.head_dim = head_dim

    def split(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        """Apply the norm to this rank's heads, [t, features/tp]."""
        return self(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)


class FullWidthNorm(RmsNorm):
    """A norm over all heads together, which are split over ranks."""

    def __init__(self, head_dim: int, num_heads: int, eps: float):
        super().__init__(head_dim * num_heads, eps)
        self.features = head_dim * num_heads

    def split(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        """Apply the norm to this rank's heads, [t, features/tp]."""
        return ops.norm_full_width(x, self.weight, self.eps, self.features)


# The class for each value of ``ModelSpec.qk_norm``.
QK_NORMS: dict[str, type[HeadNorm] | type[FullWidthNorm]] = {
    "head": HeadNorm,
    "full": FullWidthNorm,
}


class Attention(nn.Module):
    """Attention with grouped heads, and optionally a norm of each query and key before RoPE."""

    def __init__(self, spec: ModelSpec, window: int | None):
        super().__init__()
        self.head_dim, self.window = spec.head_dim, window
        q_features, kv_features = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Projection(spec.hidden_size, q_features, spec.qkv_bias)
        self.k_proj = Projection(spec.hidden_size, kv_features, spec.qkv_bias)
        self.v_proj = Projection(spec.hidden_size, kv_features, spec.qkv_bias)
        self.o_proj = Projection(q_features, spec.hidden_size, spec.o_bias)
        self.q_norm: HeadNorm | FullWidthNorm | None = None
        self.k_norm: HeadNorm | FullWidthNorm | None = None
        if spec.qk_norm is not None:
            norm = QK_NORMS[spec.qk_norm]
            self.q_norm = norm(spec.head_dim, spec.num_heads, spec.norm_eps)
            self.k_norm = norm(spec.head_dim, spec.num_kv_heads, spec.norm_eps)

    def qkv(self, x: torch.Tensor, context: Context, ops: Ops) -> Qkv:
        """Return this rank's q, k and v of the layer's input [t/tp, hidden]."""
        cos, sin = context.cos, context.sin
        num_tokens = cos.shape[0] * cos.shape[2]
        q, k, v = (
            without_padding(y, num_tokens)
            for y in ops.column(x, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm.split(q, ops), self.k_norm.split(k, ops)
        q, k, v = (
            y.view(cos.shape[0], -1, y.shape[1] // self.head_dim, self.head_dim).transpose(1, 2)
            for y in (q, k, v)
        )
        return Qkv(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)

    def attend(self, qkv: Qkv, context: Context, ops: Ops) -> torch.Tensor:
        """Return the attention output of this rank's heads, [b, s, Hq, d]."""
        return ops.attend(qkv, context.batch, self.window)

    def project(self, attention_output: torch.Tensor, ops: Ops) -> torch.Tensor:
        """Apply the output projection: [b, s, Hq, d] to [t/tp, hidden]."""
        return ops.row(attention_output.flatten(2).flatten(0, 1), self.o_proj)


@fused_on_gpu
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up (Shazeer, arXiv 2002.05202)."""
    return F.silu(gate) * up


class Mlp(nn.Module):
    """The SwiGLU MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        hidden, intermediate, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        self.gate_proj = Projection(hidden, intermediate, bias)
        self.up_proj = Projection(hidden, intermediate, bias)
        self.down_proj = Projection(intermediate, hidden, bias)

    def forward(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        gate, up = ops.column(x, self.gate_proj, self.up_proj)
        return ops.row(swiglu(gate, up), self.down_proj)


class DecoderLayer(Protocol):
    """One layer, in three parts, so that losses can read the tensors between them."""

    def qkv(self, x: torch.Tensor, context: Context, ops: Ops) -> Qkv:
        """Return q, k and v of the residual [t/tp, hidden], which the layer's relations read."""
        ...

    def attend(self, qkv: Qkv, context: Context, ops: Ops) -> torch.Tensor:
        """Return the attention output [b, s, Hq, d]."""
        ...

    def rest(self, x: torch.Tensor, attention_output: torch.Tensor, ops: Ops) -> torch.Tensor:
        """Apply the output projection and the MLP; return the layer's output [t/tp, hidden]."""
        ...


class PreNormLayer(nn.Module):
    """One layer with norms before attention and before the MLP, as in Llama."""

    def __init__(self, spec: ModelSpec, window: int | None):
        super().__init__()
        self.input_layernorm = RmsNorm(spec.hidden_size, spec.norm_eps)
        self.self_attn = Attention(spec, window)
        self.post_attention_layernorm = RmsNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = Mlp(spec)

    def qkv(self, x: torch.Tensor, context: Context, ops: Ops) -> Qkv:
        return self.self_attn.qkv(self.input_layernorm(x), context, ops)

    def attend(self, qkv: Qkv, context: Context, ops: Ops) -> torch.Tensor:
        return self.self_attn.attend(qkv, context, ops)

    def rest(self, x: torch.Tensor, attention_output: torch.Tensor, ops: Ops) -> torch.Tensor:
        x = x + self.self_attn.project(attention_output, ops)
        return x + self.mlp(self.post_attention_layernorm(x), ops)


class PostNormLayer(nn.Module):
    """One layer with norms after attention and after the MLP, as in OLMo 2."""

    def __init__(self, spec: ModelSpec, window: int | None):
        super().__init__()
        self.self_attn = Attention(spec, window)
        self.post_attention_layernorm = RmsNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = Mlp(spec)
        self.post_feedforward_layernorm = RmsNorm(spec.hidden_size, spec.norm_eps)

    def qkv(self, x: torch.Tensor, context: Context, ops: Ops) -> Qkv:
        return self.self_attn.qkv(x, context, ops)

    def attend(self, qkv: Qkv, context: Context, ops: Ops) -> torch.Tensor:
        return self.self_attn.attend(qkv, context, ops)

    def rest(self, x: torch.Tensor, attention_output: torch.Tensor, ops: Ops) -> torch.Tensor:
        x = x + self.post_attention_layernorm(self.self_attn.project(attention_output, ops))
        return x + self.post_feedforward_layernorm(self.mlp(x, ops))


# The class for each value of ``ModelSpec.norms``.
LAYERS = {"before": PreNormLayer, "after": PostNormLayer}
