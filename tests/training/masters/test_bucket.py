"""Buckets: cutting parameters into parts, and putting them together again."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from megalard.parallel.mesh import SINGLE, Axis
from megalard.training.masters import bucket as bucket_module
from megalard.training.masters.bucket import Bucket

# Rows that three ranks share evenly, unevenly, and of which the last ranks get none.
SHAPES = [(6, 2), (7, 3), (3,), (1, 4), (4,), (2, 2, 5)]


def make(rank: int, size: int, dtype=torch.float32, gradient_dtype=torch.float32) -> Bucket:
    """Return one rank's bucket; ranks that start no exchange need no process group."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    axis = SINGLE if size == 1 else Axis(None, rank, size)
    return Bucket(parameters, axis, dtype, gradient_dtype, is_offloaded=False)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_parts_of_all_ranks_are_those_of_torch_chunk(size):
    for rank in range(size):
        bucket = make(rank, size)
        for number, parameter in enumerate(bucket.parameters):
            chunks = parameter.detach().chunk(size)
            expected = chunks[rank] if rank < len(chunks) else parameter.detach()[:0]
            assert torch.equal(bucket.view(bucket.master.detach(), number), expected)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_rows_of_all_ranks_together_are_the_parameters(size):
    buckets = [make(rank, size) for rank in range(size)]
    packed = torch.stack([bucket.master.detach() for bucket in buckets])
    first = buckets[0]
    for part, parameter in zip(first.parts, first.parameters, strict=True):
        copied = torch.full_like(parameter.detach(), float("nan"))
        for source, target in part.pairs(packed, copied):
            target.copy_(source)
        assert torch.equal(copied, parameter.detach())


def test_padding_is_zero():
    bucket = make(2, 3)
    used = sum(bucket.view(bucket.master, number).numel() for number in range(len(SHAPES)))
    assert used < bucket.master.numel()
    assert bucket.master.detach().count_nonzero() == used


def test_parameters_are_rounded_and_masters_are_exact():
    exact, rounded = make(0, 1), make(0, 1, torch.bfloat16)
    for number, (a, b) in enumerate(zip(exact.parameters, rounded.parameters, strict=True)):
        assert b.dtype == torch.bfloat16 and torch.equal(b, a.bfloat16())
        assert torch.equal(rounded.view(rounded.master, number), a)


@pytest.mark.parametrize(
    ("gradient_dtype", "expected"),
    # bf16 has eight bits: the spacing between 256 and 512 is 2, and adding 1 to 256 is lost.
    [(torch.float32, 256 + 3 * 1.0), (torch.bfloat16, 256.0)],
)
def test_the_dtype_of_gradients_decides_what_sums_lose(gradient_dtype, expected):
    bucket = make(0, 1, torch.bfloat16, gradient_dtype)
    for value in (256.0, 1.0, 1.0, 1.0):
        for parameter in bucket.parameters:
            parameter.grad = torch.full_like(parameter, value)
        bucket.start_reduction()
        bucket.finish_reduction()
    assert bucket.gradient.dtype == gradient_dtype and (bucket.gradient == expected).all()
    bucket.give_gradient()
    assert bucket.master.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_sent_in_their_dtype_and_padding_as_zeros(dtype, monkeypatch):
    """New tensors hold NaN in this test, so that padding that is not set would be sent as NaN."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(
        bucket_module, "start_reduce_scatter_tokens", lambda packed, axis: sent.append(packed)
    )
    bucket = make(1, 3, torch.bfloat16, dtype)
    for parameter in bucket.parameters[:-1]:
        parameter.grad = torch.ones_like(parameter)
    torch.use_deterministic_algorithms(True)
    try:
        total = bucket.start_reduction()
    finally:
        torch.use_deterministic_algorithms(False)
    (packed,) = sent
    assert packed.dtype == dtype and packed.numel() == 3 * bucket.gradient.numel()
    # 12 + 21 + 3 + 4 + 4 elements; the last parameter has no gradient.
    assert total == packed.float().sum() == 44


def test_the_fp32_copy_of_a_bf16_gradient_is_freed_after_the_update():
    bucket = make(0, 1, torch.bfloat16, torch.bfloat16)
    bucket.give_gradient()
    copy = weakref.ref(bucket.master.grad)
    bucket.take_back_gradient()
    assert copy() is None and bucket.gradient.dtype == torch.bfloat16


def test_a_parameter_without_a_gradient_contributes_zero():
    bucket = make(0, 1)
    bucket.parameters[1].grad = torch.ones(SHAPES[1])
    total = bucket.start_reduction()
    bucket.finish_reduction()
    assert total.item() == bucket.gradient.sum().item() == 21
    assert bucket.parameters[1].grad is None, "it was taken"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_gradient_that_is_not_finite_is_seen(value):
    bucket = make(0, 1)
    bucket.parameters[3].grad = torch.tensor([[1.0, float(value), 2.0, 3.0]])
    assert not torch.isfinite(bucket.start_reduction())


def test_offloaded_masters_are_updated_on_the_host():
    parameters = [nn.Parameter(torch.ones(3, 2))]
    bucket = Bucket(parameters, SINGLE, torch.bfloat16, torch.float32, is_offloaded=True)
    parameters[0].grad = torch.full_like(parameters[0], 2.0)
    bucket.start_reduction()
    bucket.finish_reduction()
    bucket.give_gradient()
    assert bucket.master.device.type == "cpu" and bucket.master.grad.tolist() == [2.0] * 6
    with torch.no_grad():
        bucket.master.sub_(bucket.master.grad, alpha=0.25)
    bucket.finish_gather(bucket.start_gather())
    assert (parameters[0] == 0.5).all()
