"""Masters on GPUs: in host memory, and divided over NCCL ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megalard.parallel.mesh import build_mesh
from tests.parity.cases import ALL_CASES, make_config, make_models
from tests.parity.worker import make_distiller, micro_batches
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu
CASE = ALL_CASES["all-everything"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(CASE, folder)
    return folder


def take_steps(folder: Path, mesh, dtype: str, **parallel: bool | str):
    """Return the distiller after two steps."""
    config = make_config(CASE, folder, dtype=dtype)
    options = {"offload": False, "offload_optimizer": False, "shard_optimizer": False, **parallel}
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **options))
    distiller = make_distiller(config, mesh)
    for step in range(2):
        distiller.step(micro_batches(CASE, step, mesh, 1), step)
    return distiller


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_an_update_on_the_host_is_that_of_the_gpu(dtype, tolerance, models):
    mesh = build_mesh("cuda", 1)
    plain = take_steps(models, mesh, dtype)
    offloaded = take_steps(models, mesh, dtype, offload_optimizer=True)
    for parameter in offloaded.masters.parameters:
        assert parameter.device.type == "cpu" and parameter.is_pinned()
    for state in offloaded.optimizer.state.values():
        assert state["exp_avg"].device.type == "cpu"
    offloaded.masters.complete()
    for name in plain.masters.parts:
        value, expected = offloaded.masters.value(name), plain.masters.value(name)
        # Learning rates of 1e-2 and gradients that differ by the rounding of the dtype.
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(offloaded.student.trained[name], value.to(getattr(torch, dtype)))


def _compare(folder: str, size: int) -> None:
    """Divided and whole state in fp32, and the same divided run twice in bf16."""
    mesh = build_mesh("cuda", 1)
    whole = take_steps(Path(folder), mesh, "float32").masters
    divided = take_steps(Path(folder), mesh, "float32", shard_optimizer=True).masters
    for name in whole.parts:
        value, expected = divided.value(name), whole.value(name)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    elements = sum(parameter.numel() for parameter in divided.parameters)
    assert elements < 1.1 * sum(parameter.numel() for parameter in whole.parameters) / size
    torch.use_deterministic_algorithms(True, warn_only=True)
    first, second = (
        take_steps(Path(folder), mesh, "bfloat16", shard_optimizer=True).masters for _ in range(2)
    )
    for name in first.parts:
        assert torch.equal(first.value(name), second.value(name)), name


@pytest.mark.parametrize("size", [2, 4])
def test_gpus_divide_the_state(size, models):
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    run_ranks(size, _compare, str(models), size)
