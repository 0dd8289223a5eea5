"""Compiles the Hopper kernels for sm_90 without a GPU, and checks which units of it they use.

It must run with TRITON_INTERPRET unset. Each form is launched through the host functions of the
kernels, with CPU tensors, and every launch is replaced by compilation.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from megalard.kernels.relation_kl import causal_mask, full_mask
from megalard.kernels.relation_kl.hopper.backward import hopper_backward
from megalard.kernels.relation_kl.hopper.forward import hopper_forward
from megalard.kernels.relation_kl.operands import Operands, check_operands

SHARED_BYTES = 227 << 10  # that one program may take on compute capability 9.0


class Target:
    """The part of a driver that compilation needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(function: Callable, *args) -> list[tuple[str, Any]]:
    """Return (name, compiled kernel) for each kernel that ``function(*args)`` would launch."""
    compiled, run = [], JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **kwargs):
        result = run(kernel, *arguments, grid=grid, warmup=True, **kwargs)
        compiled.append((kernel.fn.__name__, result))
        return result

    JITFunction.run = compile_only
    try:
        function(*args)
    finally:
        JITFunction.run = run
    return compiled


def relation(d: int, self_relation: bool) -> Operands:
    """Return a relation of 16-bit operands: causal and self, or of two operands in groups of 2."""
    rows = torch.empty(2, 4, 512, d, dtype=torch.bfloat16)
    if self_relation:
        return check_operands(rows, rows, None, None, causal_mask(2, 512), None, None)
    cols = torch.empty(2, 2, 512, d, dtype=torch.bfloat16)
    return check_operands(rows, rows, cols, cols, full_mask(2, 512, 512), None, None)


def main() -> None:
    triton.runtime.driver.set_active(Target())
    for d, self_relation in ((128, True), (64, False)):
        op = relation(d, self_relation)
        lse = torch.empty(2, 4, 512)
        # One expanded number becomes a factor of the gradient, other weights are read per row.
        weight = torch.ones(1, 1, 1).expand(2, 4, 512) if self_relation else torch.ones(2, 4, 512)

        partial = not self_relation
        compiled = compile_launches(hopper_forward, op, partial)
        compiled += compile_launches(hopper_backward, op, lse, lse, weight, torch.bfloat16)
        names = ["_forward_kernel", "_backward_kernel"] + ["_columns_kernel"] * (not op.is_self)
        assert [name for name, _ in compiled] == names
        for name, kernel in compiled[:2]:
            shared, ptx = kernel.metadata.shared, kernel.asm["ptx"]
            print(f"{name}, head_dim {d}: {shared} bytes of shared memory")
            assert shared <= SHARED_BYTES
            assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx
            assert "setmaxnreg" in ptx


if __name__ == "__main__":
    main()
