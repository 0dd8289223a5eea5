"""Compiles the Hopper kernels for sm_90 without a GPU, and checks what they use of the chip."""

import torch
import triton
from triton.backends.compiler import GPUTarget

from megalard.kernels.relation_kl.hopper import backward as hopper_backward
from megalard.kernels.relation_kl.hopper import forward as hopper_forward
from megalard.kernels.relation_kl.hopper.tiles import descriptor


class Target:
    """As much of a driver as compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def kernels(d: int, self_relation: bool):
    """(name, compiled kernel) of the forms of forward and backward for one head_dim."""
    x = torch.empty(2, 4, 512, d, dtype=torch.bfloat16)
    interval, stats = torch.empty(2, 512, dtype=torch.int32), torch.empty(5, 2, 4, 512)
    rows, tiles = descriptor(x, 64), descriptor(x, hopper_forward.BLOCK_COLUMNS)
    blocks = hopper_forward.BLOCKS_OF_HEAD_DIM[d]
    yield "forward", hopper_forward._forward_kernel.warmup(
        rows, rows, tiles, tiles, interval, interval, interval, stats, 2, 4, 1, 512, 8, 0.1, 0.1,
        GROUPS=blocks.groups, STAGES=blocks.stages, REGISTERS=blocks.registers,
        PARTIAL=not self_relation, grid=(1,), num_warps=4, maxnreg=blocks.entry_registers,
    )  # fmt: skip
    yield "backward", hopper_backward._backward_kernel.warmup(
        rows, rows, rows, rows, stats, stats, stats, stats, interval, interval, interval, interval,
        x, stats, interval, *x.stride()[:3], 2, 4, 1, 1, 512, 512, 8, 0.1, 0.1, 0.1,
        STAGES=3, SELF=self_relation, WEIGHTED=not self_relation, HAS_UNIT=self_relation,
        LOG2_GAIN=0, grid=(1,), num_warps=4, maxnreg=128,
    )  # fmt: skip


def main() -> None:
    triton.runtime.driver.set_active(Target())
    for d, self_relation in ((128, True), (64, False)):
        for name, kernel in kernels(d, self_relation):
            shared = kernel.metadata.shared
            ptx = kernel.asm["ptx"]
            print(f"{name}, head_dim {d}: {shared} bytes of shared memory")
            assert shared <= 227 << 10
            assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx
            assert "setmaxnreg" in ptx


if __name__ == "__main__":
    main()
