"""The GPUs that estimates know: their memory, and the rates that were measured or are assumed.

Rates are in FLOP/s and bytes per second. The rates of the H100 are from docs/figures/relation.json
(the relation and cuDNN's attention, by head_dim and length) and docs/figures/step.json (products,
and what pointwise kernels and the optimizer reach). Those of other GPUs are the H100's, in
proportion to the data sheets.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch

from megalard.errors import UserError, shown

GIB = 2**30
NETWORK = 50e9
"""Bytes per second that a GPU sends to other nodes: a 400 Gb/s card per GPU."""
TIME_ERROR = 0.15
"""The largest relative difference between an estimated and a measured time on measured GPUs."""
UNMEASURED_TIME_ERROR = 0.4
"""What estimates state for GPUs whose rates follow from the data sheets."""

_LENGTHS = (4096, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Kernel:
    """The rate of a kernel by the length of what it reads.

    Attributes:
        rates: FLOP/s at each of ``_LENGTHS``.
    """

    rates: tuple[float, ...]

    def at(self, length: float) -> float:
        """Return the rate at a length, between the measured ones by the logarithm of the length.

        Below the shortest measured length, work falls as the square and launches do not, so that
        the rate falls in proportion to the length.
        """
        if length <= _LENGTHS[0]:
            return self.rates[0] * length / _LENGTHS[0]
        for number, upper in enumerate(_LENGTHS[1:]):
            if length <= upper:
                lower, low, high = _LENGTHS[number], *self.rates[number : number + 2]
                place = math.log(length / lower) / math.log(upper / lower)
                return low + place * (high - low)
        return self.rates[-1]


def _tera(*rates: float) -> Kernel:
    return Kernel(tuple(rate * 1e12 for rate in rates))


@dataclass(frozen=True)
class HeadRates:
    """Rates of the kernels whose work grows with the square of the length, for one head_dim."""

    attention_forward: Kernel
    attention_backward: Kernel
    relation_forward: Kernel
    relation_backward: Kernel


@dataclass(frozen=True)
class Gpu:
    """A type of GPU.

    Attributes:
        name: as it is printed.
        memory: bytes, as torch reports them.
        peak: dense bf16 FLOP/s of the data sheet, for the model FLOP utilization.
        bandwidth: bytes per second of device memory, of the data sheet.
        scale: the rate of products divided by the H100's.
        is_measured: whether the rates were measured on it.
        node_exchange: bytes per second that one rank sends within a node.
        host: bytes per second between device and host memory, for offloading.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float
    scale: float
    is_measured: bool
    node_exchange: float
    host: float = 60e9

    @property
    def products(self) -> float:
        """The rate of products with weights."""
        return _H100_PRODUCTS * self.scale

    @property
    def pointwise(self) -> float:
        """The bytes per second of norms, RoPE, SwiGLU, sums and copies."""
        return _POINTWISE_SHARE * self.bandwidth

    @property
    def update(self) -> float:
        """The bytes per second of the optimizer's kernels."""
        return _UPDATE_SHARE * self.bandwidth

    def heads(self, head_dim: int) -> HeadRates:
        """Return the rates for a head_dim: those of 64 up to 64, and those of 128 above it."""
        rates = _D64 if head_dim <= 64 else _D128

        def scaled(kernel: Kernel) -> Kernel:
            return Kernel(tuple(rate * self.scale for rate in kernel.rates))

        return HeadRates(*(scaled(getattr(rates, name)) for name in HeadRates.__annotations__))


# docs/figures/relation.json, shapes d128 and d64. At 4096 the benchmark's kernels are too short to
# lower the clocks as a step does: in docs/figures/step.json the same kernels take 1 / 0.88 as long.
_IN_STEP = 0.88
_D128 = HeadRates(
    _tera(538 * _IN_STEP, 664, 620, 618, 557),
    _tera(444 * _IN_STEP, 548, 553, 543, 539),
    _tera(483 * _IN_STEP, 614, 570, 572, 563),
    _tera(397 * _IN_STEP, 498, 515, 520, 490),
)
_D64 = HeadRates(
    _tera(316 * _IN_STEP, 475, 488, 471, 454),
    _tera(339 * _IN_STEP, 460, 429, 431, 419),
    _tera(328 * _IN_STEP, 389, 371, 368, 375),
    _tera(316 * _IN_STEP, 436, 383, 424, 422),
)
# docs/figures/step.json: 242 ms of products for 0.175 PFLOP, which is 0.93 of the 8192³ product.
_H100_PRODUCTS = 724e12
# The rest of the traced step takes some 60 ms for the 113 GB that ``time`` counts.
_POINTWISE_SHARE = 0.56
# The update of 805M LoRA elements takes 13.4 ms for 44 bytes per element.
_UPDATE_SHARE = 0.79
# The exchanges of tp in docs/figures/step_tp2.json: 28.5 GB in some 0.12 s.
_NVLINK = 240e9

# The host rates of 60 GB/s follow from 32768 tokens in docs/figures/step_long.json and a step whose
# copies to the host and back were not hidden: 68 GB took 1.14 s. The others are those of PCIe 4.
# Memory is what torch.cuda.get_device_properties reports, to within 0.3 GiB.
GPUS = (
    Gpu("B200", 178.3 * GIB, 2250e12, 8.0e12, 2250 / 989, False, 2 * _NVLINK),
    Gpu("H200", 139.7 * GIB, 989e12, 4.8e12, 1.0, True, _NVLINK),
    Gpu("H100 PCIe", 79.1 * GIB, 756e12, 2.0e12, 756 / 989, False, 50e9),
    Gpu("H100", 79.1 * GIB, 989e12, 3.35e12, 1.0, True, _NVLINK),
    Gpu("A100 40GB", 39.4 * GIB, 312e12, 1.56e12, 312 / 989, False, _NVLINK / 1.5, 24e9),
    Gpu("A100", 79.1 * GIB, 312e12, 2.0e12, 312 / 989, False, _NVLINK / 1.5, 24e9),
    Gpu("L40S", 44.4 * GIB, 362e12, 0.86e12, 362 / 989, False, 24e9, 24e9),
    Gpu("RTX 4090", 23.5 * GIB, 165e12, 1.0e12, 165 / 989, False, 12e9, 24e9),
)


@dataclass(frozen=True)
class Machines:
    """The GPUs that a run is planned for.

    Attributes:
        gpu: their type.
        per_node: GPUs of a node.
        nodes: nodes.
        network: bytes per second that one rank sends to other nodes.
        host_memory: bytes of the host memory of a node; None if it is not known.
    """

    gpu: Gpu
    per_node: int
    nodes: int
    network: float
    host_memory: float | None = None

    @property
    def ranks(self) -> int:
        """All GPUs, one per rank."""
        return self.per_node * self.nodes

    def __str__(self) -> str:
        nodes = f", {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.per_node} x {self.gpu.name} ({self.gpu.memory / GIB:.1f} GiB){nodes}"


def peak_flops(device: torch.device) -> float | None:
    """Return the peak bf16 FLOP/s of a GPU; None for GPUs that the table does not have."""
    gpu = gpu_of(device)
    return None if gpu is None else gpu.peak


def gpu_of(device: torch.device) -> Gpu | None:
    """Return the entry of the table for a device; None if there is none."""
    if device.type != "cuda":
        return None
    return _named(torch.cuda.get_device_name(device))


def parse_gpus(text: str, memory: float | None, tflops: float | None) -> tuple[int, Gpu]:
    """Return the number and the type of the GPUs that a text such as ``8 x H100 80GB`` names.

    Args:
        memory: GiB per GPU, in place of the table's.
        tflops: dense bf16 TFLOP/s of the data sheet, in place of the table's.

    Raises:
        UserError: the text has no number or no name, or the table does not have the GPU and memory
            or rate are missing.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x\u00d7*]?\s*)?([A-Za-z].*?)\s*", text, re.IGNORECASE)
    if match is None or not 1 <= (count := int(match[1] or 1)) <= 2**16:
        raise UserError(
            f"--gpus {shown(text)} is not a number and a type of GPUs: give for example "
            "--gpus '8 x H100 80GB'"
        )
    name, gpu = match[2], _named(match[2])
    if gpu is None and (memory is None or tflops is None):
        names = ", ".join(gpu.name for gpu in GPUS)
        raise UserError(
            f"the GPU {shown(name)} is not in the table ({names}): give --gpu-memory GIB and "
            "--gpu-tflops N, its dense bf16 TFLOP/s"
        )
    if gpu is None:
        assert tflops is not None
        (h100,) = (gpu for gpu in GPUS if gpu.name == "H100")
        scale = tflops * 1e12 / h100.peak
        gpu = replace(
            h100,
            name=name,
            bandwidth=h100.bandwidth * scale,
            node_exchange=h100.node_exchange * scale,
        )
    size = re.search(r"(\d+)\s*G(?:i?B)?\b", name, re.IGNORECASE)
    if memory is None and size is not None and not _is_about(float(size[1]), gpu.memory):
        raise UserError(
            f"--gpus {shown(text)}: the {gpu.name} of the table has {gpu.memory / GIB:.1f} GiB: "
            "give --gpu-memory GIB if yours has another size"
        )
    if memory is not None:
        gpu = replace(gpu, memory=memory * GIB)
    if tflops is not None:
        (h100,) = (gpu for gpu in GPUS if gpu.name == "H100")
        scale = tflops * 1e12 / h100.peak
        gpu = replace(gpu, peak=tflops * 1e12, scale=scale, is_measured=False)
    return count, gpu


def _is_about(size: float, memory: float) -> bool:
    """Whether the size in a GPU's name, in GB or GiB, is that of the table."""
    return any(abs(size / (memory / unit) - 1) < 0.1 for unit in (1e9, GIB))


def _named(name: str) -> Gpu | None:
    """Return the first entry of the table whose words and whole numbers are all in ``name``.

    The spaces may be others, as in RTX4090, H100PCIe and 40 GB.
    """
    for gpu in GPUS:
        patterns = (
            re.sub(r"(\d+)", r"(?<!\\d)\1(?!\\d)[\\s_-]*", word) for word in gpu.name.split()
        )
        if all(re.search(pattern, name, re.IGNORECASE) for pattern in patterns):
            return gpu
    return None
