"""Attention over the cp axis against plain attention of the full block in one process."""

from __future__ import annotations

import functools
import json
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megalard.model.merged_attention import uses_cudnn
from megalard.parallel.collectives import PendingCollective
from megalard.parallel.context import attention as context_attention
from megalard.parallel.context.attention import attend_over_axis
from megalard.parallel.context.shard import SequenceShard, Span
from megalard.parallel.mesh import Axis, build_mesh
from tests.parity.cases import Case, make_config, make_models
from tests.parity.worker import make_distiller, micro_batches
from tests.ranks import run_ranks

BATCH, DIM, PIECE = 2, 16, 5
NAMES = ("out", "dq", "dk", "dv")
CASE = Case("llama", "lora", data="whole", depth=3)


@dataclass(frozen=True)
class Blocks:
    """The part of a batch that attention reads."""

    shard: SequenceShard
    documents: tuple[tuple[int, int, int], ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.shard.spans(self.documents)


def whole_rows(length: int, batch: int) -> tuple[tuple[int, int, int], ...]:
    """Return one document per row, which fills it."""
    return tuple((row, 0, length) for row in range(batch))


def attend(q, k, v, shard: SequenceShard) -> torch.Tensor:
    """Attend over the axis in rows that are one document each."""
    documents = whole_rows(shard.length, q.shape[0])
    return attend_over_axis(q, k, v, None, Blocks(shard, documents))


def values_of(function, tensors, upstream) -> list[torch.Tensor]:
    """Return the output and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def plain(q, k, v) -> torch.Tensor:
    """Attend in one process, with torch."""
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def _against_plain(size: int) -> None:
    axis = build_mesh("cpu", 1, size).cp
    shard = SequenceShard(2 * size * PIECE, axis)
    for heads, kv_heads in ((4, 4), (4, 2), (3, 1)):
        torch.manual_seed(heads)  # the same on every rank
        shapes = [(BATCH, h, shard.length, DIM) for h in (heads, kv_heads, kv_heads)]
        tensors = [torch.randn(shape) for shape in shapes]
        upstream = torch.randn(BATCH, shard.length, heads, DIM)
        expected = values_of(plain, [x.double() for x in tensors], upstream)
        # Projections have tokens before heads, and attention reads a transposed view of them.
        local = [shard.cut(x, 2).transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        arguments = (local, shard.cut(upstream, 1))
        actual = values_of(functools.partial(attend, shard=shard), *arguments)
        for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
            theirs = shard.cut(theirs, 1 if name == "out" else 2)
            # The 2^-24 of fp32 in each of some ten roundings: dot products of 16, sums of at most
            # 50 terms with weights below one, and a merge.
            error = float((ours - theirs).norm() / theirs.norm())
            assert error < 1e-6, f"{name} of rank {axis.rank}, {kv_heads} heads: off by {error:.1e}"

        again = values_of(functools.partial(attend, shard=shard), *arguments)
        assert all(map(torch.equal, again, actual)), f"a second run differs on rank {axis.rank}"
        checkpointed = functools.partial(checkpoint, attend, use_reentrant=False, shard=shard)
        again = values_of(checkpointed, *arguments)
        assert all(map(torch.equal, again, actual)), f"checkpointing differs on rank {axis.rank}"


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_the_result_is_plain_attention_with_the_same_bits_every_time(size):
    run_ranks(size, _against_plain, size)


def _record(events: list[str]) -> ExitStack:
    """Note in order what is started, awaited and computed."""

    def noting(name, function):
        def call(*arguments):
            events.append(name(*arguments) if callable(name) else name)
            return function(*arguments)

        return call

    def part(*arguments) -> str:
        return "local" if arguments[-1] else "remote"

    stack = ExitStack()
    for target, attribute, name in (
        (context_attention, "start_all_gather_tokens", "gather"),
        (context_attention, "start_reduce_scatter_tokens", "scatter"),
        (context_attention, "attention_part", part),
        (context_attention, "attention_part_backward", part),
        (PendingCollective, "wait", "wait"),
    ):
        function = noting(name, getattr(target, attribute))
        stack.enter_context(mock.patch.object(target, attribute, function))
    return stack


def _order(results: str) -> None:
    axis = build_mesh("cpu", 1, 3).cp
    shard, events = SequenceShard(6 * PIECE, axis), []
    tensors = [torch.randn(1, 2, shard.local_length, DIM).requires_grad_() for _ in range(3)]
    with _record(events):
        out = attend(*tensors, shard)
        events.append("backward")
        out.sum().backward()
    with open(f"{results}-{axis.rank}", "w") as file:
        json.dump(events, file)


def test_the_local_chunk_is_computed_while_the_others_are_on_their_way(tmp_path):
    run_ranks(3, _order, str(tmp_path / "events"))
    # The early pieces of the lower ranks are one part, the chunks of the higher ranks another.
    for rank, count in enumerate((1, 2, 1)):
        remote = ["remote"] * count
        forward = ["gather", "gather", "local", "wait", "wait", *remote]
        backward = [*remote, "scatter", "scatter", "local", "wait", "wait"]
        events = json.loads((tmp_path / f"events-{rank}").read_text())
        assert events == [*forward, "backward", *backward], f"on rank {rank}"


@pytest.mark.parametrize(
    ("documents", "window", "expected"),
    [
        (whole_rows(24, 2), None, True),
        (whole_rows(24, 2), 24, True),
        (whole_rows(24, 2), 23, False),
        (((0, 0, 24), (1, 0, 23)), None, False),
        (((0, 0, 24), (1, 0, 12), (1, 12, 24)), None, False),
        # The second row is padding.
        (((0, 0, 24),), None, False),
        # Rank 0 has the end of the rows, and rank 1 does not see that the last token is padding.
        (((0, 0, 23), (1, 0, 23)), None, False),
        ((), None, False),
    ],
)
def test_every_rank_chooses_the_same_way(documents, window, expected):
    for size in (2, 3):
        for rank in range(size):
            shard = SequenceShard(24, Axis(None, rank, size))
            q, k, v = torch.zeros(3, 2, 4, shard.local_length, DIM)
            overlaps = context_attention._overlaps_exchange(q, k, v, window, shard, documents)
            assert overlaps == expected


def _step(folder: str, results: str) -> None:
    """Count the calls of attention that overlap the exchange in one micro-batch."""
    mesh = build_mesh("cpu", 1, 2)
    distiller = make_distiller(make_config(CASE, folder, cp=2), mesh)
    batches = {name: part[:1] for name, part in micro_batches(CASE, 0, mesh, 1).items()}
    calls = mock.Mock(wraps=context_attention.attend_local_chunk_first)
    with mock.patch.object(context_attention, "attend_local_chunk_first", calls):
        distiller.accumulate(batches, 0)
    with open(f"{results}-{mesh.cp.rank}", "w") as file:
        json.dump(calls.call_count, file)


def test_a_step_on_rows_of_one_document_overlaps_the_exchange(tmp_path):
    """Therefore the parity cases whose rows are one document do so on layouts with cp."""
    make_models(CASE, tmp_path)
    run_ranks(2, _step, tmp_path, str(tmp_path / "calls"))
    for rank in range(2):
        # Teacher and student; of the last of three layers only q, k and v are computed.
        assert json.loads((tmp_path / f"calls-{rank}").read_text()) == 2 * 2


def _against_gathering(size: int) -> None:
    mesh = build_mesh("cuda", 1, size)
    # Pieces of 2048 tokens are the shortest that overlap the exchange.
    shard = SequenceShard(2 * size * 2048, mesh.cp)
    documents = whole_rows(shard.length, BATCH)
    spans = shard.spans(documents)

    def gathering(q, k, v):
        k, v = shard.gather(k), shard.gather(v)
        return context_attention.attention.attend(q, k, v, spans, None)

    torch.manual_seed(mesh.cp.rank)
    for kv_heads in (4, 2):
        shapes = [(BATCH, shard.local_length, h, 128) for h in (4, kv_heads, kv_heads, 4)]
        *qkv, upstream = (
            torch.randn(shape, device=mesh.device, dtype=torch.bfloat16) for shape in shapes
        )
        tensors = [x.transpose(1, 2) for x in qkv]
        assert uses_cudnn(*tensors)
        calls = mock.Mock(wraps=context_attention.attend_local_chunk_first)
        with mock.patch.object(context_attention, "attend_local_chunk_first", calls):
            actual = values_of(functools.partial(attend, shard=shard), tensors, upstream)
        assert calls.call_count == 1
        for name, ours, theirs in zip(
            NAMES, actual, values_of(gathering, tensors, upstream), strict=True
        ):
            # Each rounds the same sums to bf16, by 2^-9, in P, in dS, in each part and each merge.
            error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            assert error < 1.5e-2, f"{name} of rank {mesh.cp.rank}: off by {error:.1e}"
        # A read that did not wait for the transfer would see other bits in some run.
        for _ in range(5):
            assert torch.equal(attend(*tensors, shard), actual[0])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_overlapping_the_exchange_agrees_with_gathering_on_gpus(size):
    if size > torch.cuda.device_count() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(f"needs {size} Hopper GPUs, where torch prefers cuDNN")
    run_ranks(size, _against_gathering, size)
