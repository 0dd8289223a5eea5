"""The decoder: Llama and related models, driven by the flags of a ``ModelSpec``.

The code is plain torch on local shapes. Everything that differs between one GPU and many is behind
the protocol ``Ops``, so that this file reads the same for both. Parameters have the names of
Hugging Face.

Shapes: b sequences of s tokens are t = b * s rows. With tensor parallelism the residual stream is
[t/tp, hidden], and attention sees all tokens of this rank's heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from megalard.model.fuse import fused_on_gpu
from megalard.model.layout import Layout
from megalard.model.rope import RopeTable, apply_rope
from megalard.model.spec import ModelSpec

try:
    from apex.normalization import fused_rms_norm_affine as apex_rms_norm
except ImportError:
    apex_rms_norm = None


class BlockBatch(Protocol):
    """What the decoder needs to know of the blocks it reads; see ``megalard.data.batch.Batch``.

    Attributes:
        tokens_bs: int64 [b, s], the token ids.
        position_bs: int64 [b, s], the position of each token.
    """

    @property
    def tokens_bs(self) -> torch.Tensor: ...

    @property
    def position_bs(self) -> torch.Tensor: ...


class Ops(Protocol):
    """The operations that depend on how the model and its input are split over ranks.

    ``megalard.parallel.ops.ParallelOps`` implements them.
    """

    def column(self, x: torch.Tensor, *projections: Projection) -> list[torch.Tensor]:
        """Apply projections to one input: [t/tp, in] to [t, out_i/tp] for each."""
        ...

    def row(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        """Apply a projection to features that are split over ranks: [t, in/tp] to [t/tp, out]."""
        ...

    def embed(self, token_t: torch.Tensor, weight: torch.Tensor, first_row: int) -> torch.Tensor:
        """Look up token ids [t] in an embedding of which ``weight`` holds the rows from
        ``first_row``: [t/tp, hidden]."""
        ...

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply hidden states [t/tp, hidden] by this rank's rows of the head: [t, vocab/tp]."""
        ...

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the tokens of all ranks: [t/tp, features] to [t, features]."""
        ...

    def attend(self, qkv: Qkv, batch: BlockBatch, window: int | None) -> torch.Tensor:
        """Return the attention output [b, s, Hq, d] of causal attention within each document."""
        ...

    def with_dropout(self, token_t: torch.Tensor) -> Ops:
        """Return the same operations with LoRA's dropout, drawn from the numbers of the tokens."""
        ...


@dataclass(frozen=True)
class Context:
    """What every layer needs to know of the blocks it reads.

    Attributes:
        cos, sin: fp32 [b, 1, s, head_dim], for the s tokens of this rank.
        batch: the blocks.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    batch: BlockBatch


@dataclass
class Qkv:
    """q [b, Hq, s, d], k and v [b, Hkv, s, d] of one layer; q and k after RoPE."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Projection(nn.Module):
    """The weight [out, in] and bias [out] of a linear layer, and its LoRA pair if it has one."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.lora_scale = 0.0
        self.lora_dropout: nn.Module | None = None


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dim (Zhang and Sennrich, arXiv 1910.07467), in fp32."""

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
    """Attention with grouped heads, and optionally a norm of each query and key before RoPE."""

    def __init__(self, spec: ModelSpec, window: int | None):
        super().__init__()
        self.head_dim, self.window = spec.head_dim, window
        q_features, kv_features = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Projection(spec.hidden_size, q_features, spec.qkv_bias)
        self.k_proj = Projection(spec.hidden_size, kv_features, spec.qkv_bias)
        self.v_proj = Projection(spec.hidden_size, kv_features, spec.qkv_bias)
        self.o_proj = Projection(q_features, spec.hidden_size, spec.o_bias)
        self.q_norm, self.k_norm = (
            RmsNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else nn.Identity()
            for _ in range(2)
        )

    def qkv(self, x: torch.Tensor, context: Context, ops: Ops) -> Qkv:
        """Return this rank's q, k and v of the normed residual [t/tp, hidden]."""
        batch = context.cos.shape[0]
        q, k, v = (
            y.view(batch, -1, y.shape[1] // self.head_dim, self.head_dim)
            for y in ops.column(x, self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        cos, sin = context.cos, context.sin
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


class DecoderLayer(nn.Module):
    """One layer with norms before attention and before the MLP."""

    def __init__(self, spec: ModelSpec, window: int | None):
        super().__init__()
        self.input_layernorm = RmsNorm(spec.hidden_size, spec.norm_eps)
        self.self_attn = Attention(spec, window)
        self.post_attention_layernorm = RmsNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = Mlp(spec)

    def qkv(self, x: torch.Tensor, context: Context, ops: Ops) -> Qkv:
        """Return q, k and v of the residual [t/tp, hidden], which the layer's relations read."""
        return self.self_attn.qkv(self.input_layernorm(x), context, ops)

    def attend(self, qkv: Qkv, context: Context, ops: Ops) -> torch.Tensor:
        """Return the attention output [b, s, Hq, d]."""
        return self.self_attn.attend(qkv, context, ops)

    def rest(self, x: torch.Tensor, attention_output: torch.Tensor, ops: Ops) -> torch.Tensor:
        """Apply the output projection and the MLP; return the layer's output [t/tp, hidden]."""
        x = x + self.self_attn.project(attention_output, ops)
        return x + self.mlp(self.post_attention_layernorm(x), ops)


class DecoderBody(nn.Module):
    """All of a decoder but its head, under the name that Hugging Face gives it."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.embed_tokens = Projection(spec.hidden_size, spec.vocab_size, bias=False)
        self.layers = nn.ModuleList(DecoderLayer(spec, window) for window in spec.windows)
        self.norm = RmsNorm(spec.hidden_size, spec.norm_eps)


class Decoder(nn.Module):
    """A decoder whose parameters are this rank's slices.

    It is made without storage, on torch's meta device, and filled by ``megalard.checkpoint.build``.

    Args:
        spec: shape and flags.
        rope: the table of rotary positions.
        ops: the operations of this rank.
        layout: ``layout(name, full_shape)`` returns this rank's slice of a parameter.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rope: RopeTable,
        ops: Ops,
        layout: Callable[[str, tuple[int, ...]], Layout],
    ):
        super().__init__()
        self.spec, self.rope, self.ops = spec, rope, ops
        self.model = DecoderBody(spec)
        if not spec.tied_embeddings:
            self.lm_head = Projection(spec.hidden_size, spec.vocab_size, bias=False)
        self.layouts: dict[str, Layout] = {
            name: layout(name, tuple(parameter.shape))
            for name, parameter in self.named_parameters()
        }
        self.first_vocab_row = self.layouts["model.embed_tokens.weight"].start

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def head_weight(self) -> torch.Tensor:
        """This rank's rows [vocab/tp, hidden] of the head, which may be the embedding."""
        head = self.model.embed_tokens if self.spec.tied_embeddings else self.lm_head
        return head.weight

    def context(self, batch: BlockBatch) -> Context:
        """Return what the layers need to know of a batch."""
        return Context(*self.rope.cos_sin(batch.position_bs), batch)

    def embed(self, token_bs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the residual [t/tp, hidden] of token ids [b, s]."""
        weight = self.model.embed_tokens.weight
        return self.ops.embed(token_bs.flatten(), weight, self.first_vocab_row).to(dtype)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's logits [t, vocab/tp] of the last layer's output [t/tp, hidden]."""
        return self.ops.logits(self.model.norm(x), self.head_weight)

    def forward(self, batch: BlockBatch, dtype: torch.dtype) -> torch.Tensor:
        """Return the last layer's output [t/tp, hidden], before the final norm.

        Args:
            batch: the blocks to read.
            dtype: dtype of the activations.
        """
        context = self.context(batch)
        x = self.embed(batch.tokens_bs, dtype)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            attention_output = layer.attend(layer.qkv(x, context, self.ops), context, self.ops)
            x = layer.rest(x, attention_output, self.ops)
        return x
