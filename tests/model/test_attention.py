"""Attention over documents against dense float64 softmax: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from megalard.model import attention
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import Axis

LENGTH = 48
# rows of (start, end) of documents in a block of so many tokens; what is left out is padding
DOCUMENTS = {
    "whole": [[(0, 48)], [(0, 48)]],
    "packed": [[(0, 7), (7, 8), (8, 48)], [(0, 30), (30, 48)]],
    "padded": [[(3, 40)], [(0, 11), (20, 21)]],
}


def dense(q, k, v, documents, places, window):
    """float64; ``places`` are the queries' places in the block."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    allowed = torch.zeros(q.shape[0], q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    for row, intervals in enumerate(documents):
        for start, end in intervals:
            for i, place in enumerate(places):
                if start <= place < end:
                    first = start if window is None else max(start, place - window + 1)
                    allowed[row, i, first : place + 1] = True
    scores = q.double() @ k.mT / math.sqrt(q.shape[3])
    weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1).nan_to_num()
    return (weights @ v).transpose(1, 2)


def check(device, dtype, tolerance, kind, heads, window, ranks, scale=1):
    """Documents and block are ``scale`` times as long."""
    torch.manual_seed(0)
    length = LENGTH * scale
    documents = [[(start * scale, end * scale) for start, end in row] for row in DOCUMENTS[kind]]
    flat = tuple((row, *pair) for row, pairs in enumerate(documents) for pair in pairs)
    for rank in range(ranks):
        shard = SequenceShard(length, Axis(None, rank, ranks))
        places = shard.own_positions().tolist()
        made = [
            torch.randn(2, h, n, 16, device=device, dtype=dtype)
            for h, n in ((4, len(places)), (heads, length), (heads, length))
        ]
        upstream = torch.randn(2, len(places), 4, 16, device=device, dtype=dtype)
        results = []
        for function in (
            lambda q, k, v, shard=shard: attention.attend(q, k, v, shard.spans(flat), window),
            lambda q, k, v, places=places: dense(q, k, v, documents, places, window),
        ):
            leaves = [x.clone().requires_grad_() for x in made]
            out = function(*leaves)
            out.backward(upstream.to(out.dtype))
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for name, ours, plain in zip(("out", "dq", "dk", "dv"), *results, strict=True):
            error = (ours.double() - plain.double()).norm() / plain.double().norm().clamp(min=1e-6)
            assert error < tolerance, f"{name} of rank {rank} is off by {error:.1e}"


CASES = pytest.mark.parametrize(
    ("kind", "heads", "window", "ranks"),
    [
        (kind, heads, window, ranks)
        for kind in DOCUMENTS
        for heads, window in ((4, None), (2, None), (1, 5))
        for ranks in (1, 2)
    ],
)


def one_document_at_a_time(q, k, v, pack, sides):
    """What a variable-length kernel computes, from its arguments."""
    window = None if sides[0] < 0 else sides[0] + 1
    found = []
    for i in range(len(pack.ends_q) - 1):
        rows, columns = (slice(*ends[i : i + 2].tolist()) for ends in (pack.ends_q, pack.ends_k))
        assert rows.stop - rows.start <= pack.longest_q
        assert columns.stop - columns.start <= pack.longest_k
        parts = (x.transpose(0, 1)[None] for x in (q[rows], k[columns], v[columns]))
        found.append(attention._causal(*parts, window)[0].transpose(0, 1))
    return torch.cat(found)


@CASES
def test_packing_for_a_variable_length_kernel_is_exact(kind, heads, window, ranks, monkeypatch):
    def attend(q, k, v, spans, window):
        return attention._variable_length(one_document_at_a_time, q, k, v, spans, window)

    monkeypatch.setattr(attention, "attend", attend)
    check("cpu", torch.float32, 1e-5, kind, heads, window, ranks)


def check_merged(device, dtype, tolerance, kind, heads, window, ranks, monkeypatch, scale=1):
    if window is not None:
        pytest.skip("merged attention has no windows")
    merged = attention.merged_attention
    monkeypatch.setattr(attention, "attend", lambda q, k, v, spans, _: merged(q, k, v, spans))
    check(device, dtype, tolerance, kind, heads, window, ranks, scale)


@CASES
def test_attention_merged_of_two_parts_is_exact(kind, heads, window, ranks, monkeypatch):
    check_merged("cpu", torch.float32, 1e-5, kind, heads, window, ranks, monkeypatch)


@CASES
def test_attention_is_exact(kind, heads, window, ranks):
    # fp32 rounding through one softmax and sums of 48 terms
    check("cpu", torch.float32, 1e-5, kind, heads, window, ranks)


@pytest.mark.gpu
@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_is_exact_on_the_gpu(kind, heads, window, ranks, dtype):
    # half precision rounds probabilities and results: 2^-9 and 2^-12, and sums of 48 such
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    check("cuda", dtype, tolerance, kind, heads, window, ranks)


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU, where torch prefers cuDNN")
@CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_merged_of_two_parts_is_exact_on_the_gpu(
    kind, heads, window, ranks, dtype, monkeypatch
):
    # as test_attention_is_exact_on_the_gpu, and one more rounding of each part; no single rows,
    # which attend does not give to cuDNN
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    check_merged("cuda", dtype, tolerance, kind, heads, window, ranks, monkeypatch, scale=32)


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU, where torch prefers cuDNN")
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_long_pieces_go_to_cudnn_and_agree_with_the_variable_length_kernel(heads, dim, monkeypatch):
    torch.manual_seed(0)
    taken, merged = [], attention.merged_attention
    monkeypatch.setattr(
        attention, "merged_attention", lambda *args: taken.append(len(args[3])) or merged(*args)
    )
    # some of the pieces are too short for cuDNN, or of a single row
    documents = ((0, 0, 2049), (0, 2049, 2050), (0, 2050, 8192))
    for rank in range(2):
        spans = SequenceShard(8192, Axis(None, rank, 2)).spans(documents)
        leaves = [
            torch.randn(1, h, n, dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for h, n in ((4, 4096), (heads, 8192), (heads, 8192))
        ]
        upstream = torch.randn(1, 4096, 4, dim, device="cuda", dtype=torch.bfloat16)
        found = []
        for limit in (1024, 8192):
            monkeypatch.setattr(attention, "LONG_QUERIES", limit)
            out = attention.attend(*leaves, spans, None)
            found.append([out, *torch.autograd.grad(out, leaves, upstream)])
        for ours, other in zip(*found, strict=True):
            # each is bf16's rounding of the same sums, 2^-9, in P, in dS and in the result
            assert (ours.float() - other.float()).norm() < 1e-2 * other.float().norm()
    assert taken == [2, 2]
