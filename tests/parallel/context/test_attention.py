"""Attention over the cp axis against plain attention of the whole block in one process."""

from __future__ import annotations

import functools
import json
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megalard.model.merged_attention import takes_cudnn
from megalard.parallel.collectives import Posted
from megalard.parallel.context import attention as context_attention
from megalard.parallel.context.attention import attend_over_axis
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import Axis, build_mesh
from tests.parity.cases import Case, make_config, make_models
from tests.parity.worker import make_distiller, micro_batches
from tests.ranks import run_ranks

BATCH, DIM, PIECE = 2, 16, 5
NAMES = ("out", "dq", "dk", "dv")
CASE = Case("llama", "lora", data="whole")


def whole_rows(length: int, batch: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((row, 0, length) for row in range(batch))


def attend(q, k, v, shard: SequenceShard) -> torch.Tensor:
    documents = whole_rows(shard.length, q.shape[0])
    spans = shard.spans(documents)
    return attend_over_axis(q, k, v, None, shard=shard, documents=documents, spans=spans)


def values_of(function, tensors, upstream) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def plain(q, k, v) -> torch.Tensor:
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
        # tokens before heads, as projections lie, of which attention sees a transposed view
        cut = [shard.cut(x, 2).transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        own = (cut, shard.cut(upstream, 1))
        found = values_of(functools.partial(attend, shard=shard), *own)
        for name, ours, theirs in zip(NAMES, found, expected, strict=True):
            theirs = shard.cut(theirs, 1 if name == "out" else 2)
            # fp32's 2^-24 in each of some ten roundings: dot products of 16, sums of at most 50
            # terms of weights below one, a merge
            error = float((ours - theirs).norm() / theirs.norm())
            assert error < 1e-6, f"{name} of rank {axis.rank}, {kv_heads} heads: off by {error:.1e}"

        again = values_of(functools.partial(attend, shard=shard), *own)
        assert all(map(torch.equal, again, found)), f"other bits in a second run on {axis.rank}"
        recompute = functools.partial(checkpoint, attend, use_reentrant=False, shard=shard)
        again = values_of(recompute, *own)
        assert all(map(torch.equal, again, found)), f"other bits recomputed on rank {axis.rank}"


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_own_chunk_first_is_plain_attention_twice_and_recomputed(size):
    run_ranks(size, _against_plain, size)


def _record(events: list[str]) -> ExitStack:
    """Note what is posted, awaited and computed, in order."""

    def noted(name, function):
        def call(*arguments):
            events.append(name(*arguments) if callable(name) else name)
            return function(*arguments)

        return call

    def part(*arguments) -> str:
        return "own" if arguments[-1] else "others"

    stack = ExitStack()
    for target, attribute, name in (
        (context_attention, "post_all_gather_tokens", "gather"),
        (context_attention, "post_reduce_scatter_tokens", "scatter"),
        (context_attention, "attention_part", part),
        (context_attention, "attention_part_backward", part),
        (Posted, "wait", "wait"),
    ):
        function = noted(name, getattr(target, attribute))
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


def test_the_own_chunk_is_computed_while_the_others_travel(tmp_path):
    run_ranks(3, _order, str(tmp_path / "events"))
    for rank, others in enumerate((1, 2, 1)):  # the lower ranks' pieces, the higher ranks' chunks
        away = ["others"] * others
        forward = ["gather", "gather", "own", "wait", "wait", *away]
        backward = [*away, "scatter", "scatter", "own", "wait", "wait"]
        found = json.loads((tmp_path / f"events-{rank}").read_text())
        assert found == [*forward, "backward", *backward], f"on rank {rank}"


@pytest.mark.parametrize(
    ("documents", "window", "expected"),
    [
        (whole_rows(24, 2), None, True),
        (whole_rows(24, 2), 24, True),
        (whole_rows(24, 2), 23, False),
        (((0, 0, 24), (1, 0, 23)), None, False),
        (((0, 0, 24), (1, 0, 12), (1, 12, 24)), None, False),
        (((0, 0, 24),), None, False),  # the second row is padding
        # rank 0 has the end of the rows, and rank 1 sees nothing of what it lacks
        (((0, 0, 23), (1, 0, 23)), None, False),
        ((), None, False),
    ],
)
def test_every_rank_takes_the_same_way(documents, window, expected):
    for size in (2, 3):
        for rank in range(size):
            shard = SequenceShard(24, Axis(None, rank, size))
            q, k, v = torch.zeros(3, 2, 4, shard.local_length, DIM)
            taken = context_attention._attends_own_chunk_first(q, k, v, window, shard, documents)
            assert taken == expected


def _step(folder: str, results: str) -> None:
    """Attention calls of one micro-step, by cp ranks that take this way."""
    mesh = build_mesh("cpu", 1, 2)
    distiller = make_distiller(make_config(CASE, folder, cp=2), mesh)
    batches = {name: part[:1] for name, part in micro_batches(CASE, 0, mesh, 1).items()}
    taken = mock.Mock(wraps=context_attention.attend_own_chunk_first)
    with mock.patch.object(context_attention, "attend_own_chunk_first", taken):
        distiller.accumulate(batches, 0)
    with open(f"{results}-{mesh.cp.rank}", "w") as file:
        json.dump(taken.call_count, file)


def test_a_step_on_whole_documents_goes_this_way(tmp_path):
    """So the parity cases of whole documents do, on layouts with cp."""
    make_models(CASE, tmp_path)
    run_ranks(2, _step, tmp_path, str(tmp_path / "calls"))
    for rank in range(2):
        # teacher and student; of the last of three layers only q, k and v are computed
        assert json.loads((tmp_path / f"calls-{rank}").read_text()) == 2 * 2


def _against_gathering(size: int) -> None:
    mesh = build_mesh("cuda", 1, size)
    # pieces of 2048: the shortest that go this way
    shard = SequenceShard(2 * size * 2048, mesh.cp)
    documents = whole_rows(shard.length, BATCH)
    spans = shard.spans(documents)

    def gathering(q, k, v):
        k, v = shard.gather(k), shard.gather(v)
        return context_attention.attention.attend(q, k, v, spans, None)

    torch.manual_seed(mesh.cp.rank)
    for kv_heads in (4, 2):
        shapes = [(BATCH, shard.local_length, h, 128) for h in (4, kv_heads, kv_heads, 4)]
        made = [torch.randn(x, device=mesh.device, dtype=torch.bfloat16) for x in shapes]
        tensors, upstream = [x.transpose(1, 2) for x in made[:3]], made[3]
        assert takes_cudnn(*tensors)
        taken = mock.Mock(wraps=context_attention.attend_own_chunk_first)
        with mock.patch.object(context_attention, "attend_own_chunk_first", taken):
            found = values_of(functools.partial(attend, shard=shard), tensors, upstream)
        assert taken.call_count == 1
        for name, ours, theirs in zip(
            NAMES, found, values_of(gathering, tensors, upstream), strict=True
        ):
            # each rounds the same sums to bf16, 2^-9, in P, in dS, in each part and in each merge
            error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            assert error < 1.5e-2, f"{name} of rank {mesh.cp.rank}: off by {error:.1e}"
        # a read that did not wait for the transfer would see other bits in some run
        for _ in range(5):
            assert torch.equal(attend(*tensors, shard), found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_own_chunk_first_agrees_with_gathering_on_gpus(size):
    if size > torch.cuda.device_count() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(f"needs {size} Hopper GPUs, where torch prefers cuDNN")
    run_ranks(size, _against_gathering, size)
