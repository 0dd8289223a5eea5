"""Attention over documents against dense float64 softmax: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from megalard import gpu
from megalard.model import attention, variable_length
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import Axis
from tests.logits import relative_error

LENGTH = 48
# For each row of the batch the (start, end) of its documents; all other places are padding.
DOCUMENTS = {
    "whole": [[(0, 48)], [(0, 48)]],
    "packed": [[(0, 7), (7, 8), (8, 48)], [(0, 30), (30, 48)]],
    "padded": [[(3, 40)], [(0, 11), (20, 21)]],
}


def dense(q, k, v, documents, places, window):
    """Return attention [b, s, Hq, d] in float64, of queries at some places of the block."""
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


def check(device, dtype, tolerance, kind, heads, window, ranks, scale=1, dim=16):
    """Compare attention and its gradients on every rank.

    Args:
        scale: how much longer documents and blocks are than in ``DOCUMENTS``.
        dim: features per head.
    """
    torch.manual_seed(0)
    length = LENGTH * scale
    documents = [[(start * scale, end * scale) for start, end in row] for row in DOCUMENTS[kind]]
    flat = tuple((row, *pair) for row, pairs in enumerate(documents) for pair in pairs)
    for rank in range(ranks):
        shard = SequenceShard(length, Axis(None, rank, ranks))
        places = shard.local_positions().tolist()
        tensors = [
            torch.randn(2, h, n, dim, device=device, dtype=dtype)
            for h, n in ((4, len(places)), (heads, length), (heads, length))
        ]
        upstream = torch.randn(2, len(places), 4, dim, device=device, dtype=dtype)
        results = []
        for function in (
            lambda q, k, v, shard=shard: attention.attend(q, k, v, shard.spans(flat), window),
            lambda q, k, v, places=places: dense(q, k, v, documents, places, window),
        ):
            leaves = [x.clone().requires_grad_() for x in tensors]
            out = function(*leaves)
            out.backward(upstream.to(out.dtype))
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for name, actual, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
            difference = (actual.double() - expected.double()).norm()
            error = difference / expected.double().norm().clamp(min=1e-6)
            assert error < tolerance, f"{name} of rank {rank} is off by {error:.1e}"


def cases(heads_and_windows):
    """Parametrize a test by kind of documents, K/V heads, window and ranks."""
    return pytest.mark.parametrize(
        ("kind", "heads", "window", "ranks"),
        [
            (kind, heads, window, ranks)
            for kind in DOCUMENTS
            for heads, window in heads_and_windows
            for ranks in (1, 2)
        ],
    )


WITHOUT_WINDOWS = cases(((4, None), (2, None)))
CASES = cases(((4, None), (2, None), (1, 5)))


@CASES
def test_attention_is_exact(kind, heads, window, ranks):
    # The rounding of fp32 through one softmax and sums of 48 terms.
    check("cpu", torch.float32, 1e-5, kind, heads, window, ranks)


@pytest.mark.gpu
@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_is_exact_on_the_gpu(kind, heads, window, ranks, dtype):
    # Half precision rounds probabilities and results, by 2^-9 or 2^-12, in sums of 48 terms.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    check("cuda", dtype, tolerance, kind, heads, window, ranks)


def one_document_at_a_time(q, k, v, pack, sides):
    """Compute from its arguments what a variable-length kernel must return."""
    window = None if sides[0] < 0 else sides[0] + 1
    outputs = []
    for i in range(len(pack.ends_q) - 1):
        rows, columns = (slice(*ends[i : i + 2].tolist()) for ends in (pack.ends_q, pack.ends_k))
        assert rows.stop - rows.start <= pack.longest_q
        assert columns.stop - columns.start <= pack.longest_k
        parts = (x.transpose(0, 1)[None] for x in (q[rows], k[columns], v[columns]))
        outputs.append(attention._causal(*parts, window)[0].transpose(0, 1))
    return torch.cat(outputs)


@CASES
def test_packing_for_a_variable_length_kernel_is_exact(kind, heads, window, ranks, monkeypatch):
    def attend(q, k, v, spans, window):
        return variable_length.variable_length_attention(
            one_document_at_a_time, q, k, v, spans, window
        )

    monkeypatch.setattr(attention, "attend", attend)
    check("cpu", torch.float32, 1e-5, kind, heads, window, ranks)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    deterministic=False,
):
    """Compute what flash-attn 2 documents, after a check of what its extension demands."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert len(cu_seqlens_q) == len(cu_seqlens_k) and cu_seqlens_q[0] == cu_seqlens_k[0] == 0
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k))
    assert type(max_seqlen_q) is int and type(max_seqlen_k) is int
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0 and q.shape[2] == k.shape[2]
    assert (dropout_p, softmax_scale, causal, deterministic) == (0.0, None, True, False)
    assert window_size[1] == 0
    out = torch.zeros_like(q)
    scale = q.shape[2] ** -0.5
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    for i in range(len(cu_seqlens_q) - 1):
        rows, columns = (slice(*ends[i : i + 2].tolist()) for ends in (cu_seqlens_q, cu_seqlens_k))
        queries, keys = rows.stop - rows.start, columns.stop - columns.start
        assert queries <= max_seqlen_q and keys <= max_seqlen_k
        # The last query stands at the last key.
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
        is_seen = distance >= 0
        if window_size[0] >= 0:
            is_seen &= distance <= window_size[0]
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * scale
        weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v[columns])
    return out


@CASES
def test_flash_attn_gets_the_arguments_that_it_documents(kind, heads, window, ranks, monkeypatch):
    monkeypatch.setattr(variable_length, "flash_attn_varlen_func", flash_attn_varlen_func)
    monkeypatch.setattr(attention, "kernel_for", lambda q: variable_length.flash_attention)
    calls = []
    flash = variable_length.flash_attention
    monkeypatch.setattr(
        variable_length, "flash_attention", lambda *args: calls.append(args) or flash(*args)
    )
    check("cpu", torch.float32, 1e-5, kind, heads, window, ranks)
    # Rows that are one document without a window are left to torch.
    assert calls or (kind == "whole" and ranks == 1 and window is None)


@pytest.mark.gpu
@CASES
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", ["flash_attention", "flash_attention_3", "torch_attention"])
def test_variable_length_kernels_are_exact_on_the_gpu(
    kind, heads, window, ranks, dim, kernel, monkeypatch
):
    module = {"flash_attention": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    if kernel in module:
        pytest.importorskip(module[kernel])
    function = getattr(variable_length, kernel)

    def attend(q, k, v, spans, window):
        if not spans:
            return attention._zeros_that_depend_on(q, k, v)
        return variable_length.variable_length_attention(function, q, k, v, spans, window)

    monkeypatch.setattr(attention, "attend", attend)
    check("cuda", torch.bfloat16, 2e-2, kind, heads, window, ranks, 8, dim)


def test_a_rank_without_queries_still_gets_gradients():
    """It must join the exchange of the gradients of keys and values."""
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    out = attention.attend(q, k, v, (), None)
    assert out.shape == (1, 4, 2, 8) and not out.any()
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v))


def is_hopper() -> bool:
    """Whether the GPU is one on which torch prefers cuDNN."""
    return torch.cuda.is_available() and gpu.is_hopper(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU, where torch prefers cuDNN")
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_long_pieces_go_to_cudnn_and_agree_with_the_variable_length_kernel(heads, dim, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(variable_length, "flash_attn_3_varlen_func", None)
    merged_spans, merged = [], attention.merged_attention
    monkeypatch.setattr(
        attention,
        "merged_attention",
        lambda *args: merged_spans.append(len(args[3])) or merged(*args),
    )
    # Some of the pieces are too short for cuDNN, or have a single row.
    documents = ((0, 0, 2049), (0, 2049, 2050), (0, 2050, 8192))
    for rank in range(2):
        spans = SequenceShard(8192, Axis(None, rank, 2)).spans(documents)
        leaves = [
            torch.randn(1, h, n, dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for h, n in ((4, 4096), (heads, 8192), (heads, 8192))
        ]
        upstream = torch.randn(1, 4096, 4, dim, device="cuda", dtype=torch.bfloat16)
        results = []
        for limit in (1024, 8192):
            monkeypatch.setattr(attention, "LONG_QUERIES", limit)
            out = attention.attend(*leaves, spans, None)
            results.append([out, *torch.autograd.grad(out, leaves, upstream)])
        for cudnn, packed in zip(*results, strict=True):
            # Each rounds the same sums to bf16, by 2^-9, in P, in dS and in the result.
            assert relative_error(cudnn, packed) < 1e-2
    assert merged_spans == [2, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU, where torch prefers cuDNN")
@pytest.mark.parametrize("batch", [1, 3])
def test_the_strides_of_a_gradient_do_not_change_the_result(batch, monkeypatch):
    """Each kind of strides is used twice, so that each meets plans that others have made."""
    torch.manual_seed(0)
    monkeypatch.setattr(variable_length, "flash_attn_3_varlen_func", None)
    n, heads, dim = 2048, 4, 64
    spans = SequenceShard(n, Axis(None, 0, 1)).spans(tuple((row, 0, n) for row in range(batch)))
    leaves = [
        torch.randn(batch, heads, n, dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]
    row = torch.randn(dim, device="cuda", dtype=torch.bfloat16)
    expanded = row.expand(batch, n, heads, dim)
    heads_first = torch.empty(batch, heads, n, dim, device="cuda", dtype=torch.bfloat16)
    heads_first.copy_(expanded.transpose(1, 2))
    gradients = [expanded.contiguous(), expanded, heads_first.transpose(1, 2)] * 2

    def results(function, upstream):
        return torch.autograd.grad(function(*leaves), leaves, upstream)

    def dense(q, k, v):
        scores = q.double() @ k.double().mT / math.sqrt(dim)
        is_seen = torch.ones(n, n, dtype=torch.bool, device="cuda").tril()
        weights = scores.masked_fill(~is_seen, -math.inf).softmax(-1)
        return (weights @ v.double()).transpose(1, 2)

    expected = results(dense, gradients[0].double())
    for function in (
        lambda q, k, v: attention.attend(q, k, v, spans, None),
        lambda q, k, v: attention.merged_attention(q, k, v, spans),
    ):
        for upstream in gradients:
            for one, other in zip(results(function, upstream), expected, strict=True):
                assert relative_error(one, other) < 2e-2
