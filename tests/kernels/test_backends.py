"""The choice between the back ends, as far as a CPU can see it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megalard.kernels.relation_kl import (
    Partials,
    RelationStatistics,
    backends,
    causal_mask,
    describe_kernels,
    relation_backward,
    relation_forward,
    relation_kl,
    relation_partials,
)
from megalard.kernels.relation_kl.backends import BACKENDS, choose, hopper, torch_reference, triton

pytest.importorskip("triton")
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def fake_tensor(shape=(1, 4, 300, 128), stride=None, dtype=torch.bfloat16, address=1 << 20):
    """Return the attributes of a CUDA tensor that the choice reads."""
    real = torch.empty(shape, dtype=dtype, device="meta")
    stride = stride or real.stride()
    return SimpleNamespace(
        shape=real.shape,
        dtype=dtype,
        device=GPU,
        is_cuda=True,
        stride=lambda dim=None: stride if dim is None else stride[dim],
        element_size=real.element_size,
        data_ptr=lambda: address,
    )


def fake_relation(of_cols=None, causal=True, **of_rows):
    """Return a relation of operands as in ``fake_tensor``; without columns, a self relation."""
    rows = fake_tensor(**of_rows)
    cols = rows if of_cols is None else fake_tensor(**of_cols)
    return SimpleNamespace(
        rows_s=rows, rows_t=rows, cols_s=cols, cols_t=cols, is_self=of_cols is None,
        mask=SimpleNamespace(causal=causal),
        accumulate_dtype=torch.promote_types(rows.dtype, torch.float32),
    )  # fmt: skip


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(hopper, "UNAVAILABLE", None)
    monkeypatch.setattr(hopper.tiles, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def assert_hopper(relation, *, forward=None, backward=None):
    """Assert for both passes that Hopper serves (None), or why it does not and Triton does."""
    for is_backward, reason in ((False, forward), (True, backward)):
        given = hopper.why_not(relation, backward=is_backward, by_name=False)
        assert given is None if reason is None else reason in given
        for family in (None, "triton"):
            chosen = choose(relation, family, backward=is_backward)
            assert chosen is (hopper if reason is None else triton)


@pytest.mark.parametrize(
    "relation",
    [
        {},
        {"dtype": torch.float16, "shape": (2, 8, 33, 64)},
        {"stride": (4 * 300 * 128, 128, 4 * 128, 1)},  # [b, n, heads, d] storage
        {"stride": (7, 300 * 128, 128, 1)},  # the stride of a dimension of size 1 is never used
        {"of_cols": {"shape": (1, 1, 700, 128)}},
        # its last dimension is strided, so it is copied before the copy engine reads it
        {"of_cols": {"shape": (1, 1, 700, 128), "stride": (1, 1, 1, 700)}},
    ],
    ids=str,
)
def test_training_shapes_take_the_hopper_kernels(relation, on_hopper):
    assert_hopper(fake_relation(**relation))


@pytest.mark.parametrize(
    ("relation", "reason"),
    [
        ({"dtype": torch.float32}, "need bf16 or fp16 operands, and rows_s is torch.float32"),
        ({"shape": (1, 4, 300, 80)}, "need head_dim 64 or 128, and rows_s has 80"),
        ({"shape": (1, 4, 300, 256)}, "need head_dim 64 or 128, and rows_s has 256"),
        # 264 bytes from vector to vector
        ({"stride": (4 * 300 * 132, 300 * 132, 132, 1)}, "cannot read rows_s with strides"),
        ({"stride": (0, 0, 128, 1)}, "cannot read rows_s with strides"),
        ({"address": (1 << 20) + 8}, "cannot read rows_s"),
        (
            {"of_cols": {"shape": (1, 1, 700, 128), "stride": (1 << 40, 1, 4, 1)}},
            "cannot read cols_s",
        ),
    ],
    ids=str,
)
def test_other_operands_take_plain_triton(relation, reason, on_hopper):
    assert_hopper(fake_relation(**relation), forward=reason, backward=reason)


def test_the_copy_engine_needs_a_contiguous_last_dimension():
    assert hopper.tma_accepts(fake_tensor())
    assert not hopper.tma_accepts(fake_tensor(shape=(1, 1, 700, 128), stride=(1, 1, 1, 700)))


def test_other_devices_and_versions_take_plain_triton(on_hopper, monkeypatch):
    relation = fake_relation()
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        reason = f"need compute capability 9.x, and this GPU has {capability[0]}.{capability[1]}"
        assert_hopper(relation, forward=reason, backward=reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "UNAVAILABLE", "the reason")
    assert_hopper(relation, forward="the reason", backward="the reason")
    monkeypatch.setattr(hopper, "UNAVAILABLE", None)
    monkeypatch.setattr(hopper.tiles, "INTERPRETED", True)
    assert_hopper(relation, forward="unset TRITON_INTERPRET", backward="unset TRITON_INTERPRET")


def test_a_self_relation_that_sees_the_future_takes_the_plain_backward(on_hopper):
    assert_hopper(fake_relation(causal=False), backward="needs a causal mask")
    assert_hopper(fake_relation(of_cols={}, causal=False))


def test_float64_takes_plain_torch(on_hopper):
    relation = fake_relation(dtype=torch.float64)
    for backward in (False, True):
        assert choose(relation, None, backward=backward) is torch_reference
        reason = triton.why_not(relation, backward=backward, by_name=True)
        assert "no float64; use backend 'torch'" in reason


def test_cpu_tensors_take_plain_torch_and_the_interpreter_only_by_name(monkeypatch):
    relation = fake_relation()
    relation.rows_s.device = CPU
    for interpreted in (True, False):
        monkeypatch.setattr(triton.tiles, "INTERPRETED", interpreted)
        assert choose(relation, None, backward=False) is torch_reference
    with pytest.raises(ValueError, match="or TRITON_INTERPRET=1 set before the import"):
        choose(relation, "triton", backward=False)
    monkeypatch.setattr(triton.tiles, "INTERPRETED", True)
    assert choose(relation, "triton", backward=False) is triton


def test_the_torch_backend_is_taken_by_name_on_every_device(on_hopper):
    assert choose(fake_relation(), "torch", backward=True) is torch_reference


def test_requests_that_no_back_end_serves_are_refused():
    x, mask = torch.randn(1, 4, 6, 8), causal_mask(1, 6)
    with pytest.raises(ValueError, match="backend must be 'triton', 'torch' or None, not 'cuda'"):
        relation_kl(x, x, mask=mask, backend="cuda")
    with pytest.raises(ValueError, match="no float64"):
        relation_kl(x.double(), x.double(), mask=mask, backend="triton")


def test_the_description_names_the_back_end_and_why_faster_ones_do_not_serve(
    on_hopper, monkeypatch
):
    assert describe_kernels(GPU) == "Hopper"
    monkeypatch.setattr(hopper, "UNAVAILABLE", "the reason")
    assert describe_kernels(GPU) == "Triton (the reason)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    reason = "the Hopper kernels need compute capability 9.x, and this GPU has 8.0"
    assert describe_kernels(GPU) == f"Triton ({reason})"
    assert describe_kernels(CPU) == "plain torch"
    assert "CUDA" in hopper.why_not_on(CPU) and "CUDA" in triton.why_not_on(CPU)


def test_every_back_end_has_the_same_face():
    for backend in BACKENDS:
        assert backend.NAME and backend.FAMILY in ("triton", "torch")
        for name in ("why_not_on", "why_not", "forward", "backward"):
            assert callable(getattr(backend, name))
    assert len({backend.NAME for backend in BACKENDS}) == len(BACKENDS)
    assert BACKENDS[-1].why_not_on(CPU) is None  # the last one serves every device


class FakeBackEnd:
    """A back end that returns recognizable tensors, and records how it was called."""

    NAME, FAMILY = "fake", "fake"

    def __init__(self, forward=None, backward=None):
        self.reasons, self.calls = {False: forward, True: backward}, []

    def why_not_on(self, device):
        return None

    def why_not(self, op, *, backward, by_name):
        return self.reasons[backward]

    def forward(self, op, partial):
        self.calls.append(("forward", partial))
        numbers = torch.full((5 if partial else 3, *op.rows_s.shape[:3]), 7.0)
        return Partials(*numbers) if partial else RelationStatistics(*numbers)

    def backward(self, op, lse_s, lse_t, row_weight, out_dtype):
        self.calls.append(("backward", out_dtype))
        return torch.full_like(op.rows_s, 9.0), None


def test_the_operations_take_the_first_back_end_that_serves_the_call(monkeypatch):
    x, mask = torch.randn(1, 2, 6, 8), causal_mask(1, 6)
    lse = torch.zeros(1, 2, 6)
    fake = FakeBackEnd()
    monkeypatch.setattr(backends, "BACKENDS", (fake, *BACKENDS))
    assert (relation_forward(x, x, mask=mask).kl == 7).all()
    assert (relation_partials(x, x, mask=mask).a == 7).all()
    grad = relation_backward(x, x, None, None, lse, lse, mask=mask, out_dtype=torch.bfloat16)
    assert (grad == 9).all() and grad.dtype == torch.bfloat16
    assert fake.calls == [("forward", False), ("forward", True), ("backward", torch.bfloat16)]
    leaf = x.clone().requires_grad_()
    kl = relation_kl(leaf, x, mask=mask, backend="fake")
    assert (torch.autograd.grad(kl.sum(), leaf)[0] == 9).all()
    assert describe_kernels(CPU) == "fake"

    calls = len(fake.calls)
    assert relation_forward(x, x, mask=mask, backend="torch").kl.abs().max() < 1e-6
    assert len(fake.calls) == calls
    with pytest.raises(ValueError, match="'fake', 'triton', 'torch' or None, not 'cuda'"):
        relation_forward(x, x, mask=mask, backend="cuda")


def test_a_back_end_may_serve_one_pass_only(monkeypatch):
    x, mask = torch.randn(1, 2, 6, 8), causal_mask(1, 6)
    fake = FakeBackEnd(backward="it has no backward")
    monkeypatch.setattr(backends, "BACKENDS", (fake, *BACKENDS))
    stats = relation_forward(x, x, mask=mask)
    assert (stats.kl == 7).all()
    relation_backward(x, x, None, None, stats.lse_s, stats.lse_t, mask=mask)
    assert fake.calls == [("forward", False)]
    with pytest.raises(ValueError, match="'fake' cannot serve this call: it has no backward"):
        relation_backward(x, x, None, None, *stats[:2], mask=mask, backend="fake")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from megalard.kernels.relation_kl import causal_mask, describe_kernels, relation_kl
x = torch.randn(1, 1, 4, 8)
kl = relation_kl(x, 2 * x, mask=causal_mask(1, 4))
assert kl.isfinite().all() and kl[0, 0, -1] > 0
for device in ("cpu", "meta"):
    print(describe_kernels(torch.device(device)))
try:
    relation_kl(x, x, mask=causal_mask(1, 4), backend="triton")
except ValueError as error:
    print(error)
"""


def test_platforms_without_triton_take_plain_torch():
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    *descriptions, error = run.stdout.splitlines()
    on_cpu, on_meta = descriptions
    assert on_cpu == "plain torch"
    assert on_meta.startswith("plain torch (") and "need the triton package" in on_meta
    assert error.startswith("backend 'triton' cannot serve this call: the Triton kernels need")
