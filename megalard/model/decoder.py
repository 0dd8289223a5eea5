"""The decoder: Llama and its relatives, driven by the flags of a ``ModelSpec``.

Plain torch on local shapes. The products are handed in as ``ops`` (see
``megalard.parallel.tensor.linear``), already parallel, so the file reads the same for one GPU and
many. Parameters have Hugging Face's names.

Shapes: b sequences of s tokens make t = b*s rows; with tensor parallelism the residual stream is
[t/tp, hidden] and attention sees all tokens of this rank's heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from megalard.model.fuse import fused_on_gpu
from megalard.model.rope import RopeTable, apply_rope
from megalard.model.spec import ModelSpec

try:
    from apex.normalization import fused_rms_norm_affine as apex_rms_norm
except ImportError:
    apex_rms_norm = None


@dataclass(frozen=True)
class Context:
    """What every layer needs to know of the block it reads.

    ``cos`` and ``sin`` are [b, 1, s, head_dim] for the s tokens at hand, and
    ``attend(q, k, v, window)`` is their attention to the documents they are in
    (``megalard.parallel.context.attention.attend_over_axis``).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    attend: Callable[..., torch.Tensor]


@dataclass
class Qkv:
    """q [b, Hq, s, d], k and v [b, Hkv, s, d] of one layer, q and k after RoPE."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Projection(nn.Module):
    """Weight [out, in] and bias [out] of a linear layer, and its LoRA pair when it has one."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.lora_scale = 0.0
        self.lora_dropout: nn.Module | None = None


class RmsNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 1910.07467) over the last dim, fp32 inside."""

    def __init__(self, features: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype)
        if apex_rms_norm is not None and x.is_cuda:
            return apex_rms_norm(x, weight, weight.shape, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec, window: int | None):
        super().__init__()
        self.head_dim, self.window = spec.head_dim, window
        inner, kv_inner = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Projection(spec.hidden_size, inner, spec.qkv_bias)
        self.k_proj = Projection(spec.hidden_size, kv_inner, spec.qkv_bias)
        self.v_proj = Projection(spec.hidden_size, kv_inner, spec.qkv_bias)
        self.o_proj = Projection(inner, spec.hidden_size, spec.o_bias)
        if spec.qk_norm:
            self.q_norm = RmsNorm(spec.head_dim, spec.norm_eps)
            self.k_norm = RmsNorm(spec.head_dim, spec.norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def qkv(self, x: torch.Tensor, context: Context, ops) -> Qkv:
        """Normed residual [t/tp, hidden] to this rank's q, k, v."""
        batch = context.cos.shape[0]
        q, k, v = (
            y.view(batch, -1, y.shape[1] // self.head_dim, self.head_dim)
            for y in ops.column(x, self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        cos, sin = context.cos, context.sin
        return Qkv(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)

    def mix(self, qkv: Qkv, context: Context) -> torch.Tensor:
        """The attention output A V of this rank's heads: [b, s, Hq, d]."""
        return context.attend(qkv.q, qkv.k, qkv.v, self.window)

    def output(self, mixed: torch.Tensor, ops) -> torch.Tensor:
        """The output projection of A V: [t/tp, hidden]."""
        return ops.row(mixed.flatten(2).flatten(0, 1), self.o_proj)


@fused_on_gpu
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer, 2002.05202)."""
    return F.silu(gate) * up


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        hidden, inner, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        self.gate_proj = Projection(hidden, inner, bias)
        self.up_proj = Projection(hidden, inner, bias)
        self.down_proj = Projection(inner, hidden, bias)

    def forward(self, x: torch.Tensor, ops) -> torch.Tensor:
        gate, up = ops.column(x, self.gate_proj, self.up_proj)
        return ops.row(swiglu(gate, up), self.down_proj)


class DecoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec, window: int | None):
        super().__init__()
        self.input_layernorm = RmsNorm(spec.hidden_size, spec.norm_eps)
        self.self_attn = Attention(spec, window)
        self.post_attention_layernorm = RmsNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = Mlp(spec)

    def qkv(self, x: torch.Tensor, context: Context, ops) -> Qkv:
        """Residual [t/tp, hidden] to q, k, v: all the relations of this layer need."""
        return self.self_attn.qkv(self.input_layernorm(x), context, ops)

    def rest(self, x: torch.Tensor, mixed: torch.Tensor, ops) -> torch.Tensor:
        """What follows A V: output projection and MLP. Returns the new residual."""
        x = x + self.self_attn.output(mixed, ops)
        return x + self.mlp(self.post_attention_layernorm(x), ops)


class Decoder(nn.Module):
    """A decoder whose parameters are this rank's slices.

    Made without storage, on torch's meta device, and filled by ``megalard.checkpoint.build``.

    Args:
        spec: shape and flags.
        rope: the position table to read with.
        ops: the products, such as ``megalard.parallel.tensor.linear.TensorParallel``.
        layout: ``layout(name, full_shape)`` is this rank's slice of a parameter, such as
            ``megalard.parallel.tensor.layout.parameter_layout`` for a rank.
    """

    def __init__(self, spec: ModelSpec, rope: RopeTable, ops, layout):
        super().__init__()
        self.spec, self.rope, self.ops = spec, rope, ops
        self.model = nn.Module()
        self.model.embed_tokens = Projection(spec.hidden_size, spec.vocab_size, bias=False)
        self.model.layers = nn.ModuleList(DecoderLayer(spec, window) for window in spec.windows)
        self.model.norm = RmsNorm(spec.hidden_size, spec.norm_eps)
        if not spec.tied_embeddings:
            self.lm_head = Projection(spec.hidden_size, spec.vocab_size, bias=False)
        self.layouts = {
            name: layout(name, tuple(parameter.shape))
            for name, parameter in self.named_parameters()
        }
        self.first_vocab_row = self.layouts["model.embed_tokens.weight"].start

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def context(self, batch) -> Context:
        """The layers' context for a ``megalard.data.batch.Batch``."""
        return Context(*self.rope.cos_sin(batch.position_bs), batch.attention())

    def embed(self, token_bs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Token ids [b, s] to the residual [t/tp, hidden]."""
        weight = self.model.embed_tokens.weight
        return self.ops.embed(token_bs.flatten(), weight, self.first_vocab_row).to(dtype)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final residual [t/tp, hidden] to this rank's logits [t, vocab/tp]."""
        return self.ops.logits(self.model.norm(x), self.head_weight)

    @property
    def head_weight(self) -> torch.Tensor:
        head = self.model.embed_tokens if self.spec.tied_embeddings else self.lm_head
        return head.weight

    def forward(self, batch, dtype: torch.dtype) -> torch.Tensor:
        """A batch's tokens [b, s] to the final residual [t/tp, hidden], before the last norm."""
        context = self.context(batch)
        x = self.embed(batch.tokens_bs, dtype)
        for layer in self.layers:
            mixed = layer.self_attn.mix(layer.qkv(x, context, self.ops), context)
            x = layer.rest(x, mixed, self.ops)
        return x
