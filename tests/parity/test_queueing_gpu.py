"""A step only queues work on the GPU. It waits once, at its end, for the numbers it reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalard.parallel.mesh import build_mesh
from tests.parity.cases import ALL_CASES, make_config
from tests.parity.worker import make_distiller, micro_batches

pytestmark = pytest.mark.gpu
# With ``offload`` autograd copies the tensors it keeps to the host, and waits for the copies.
QUEUED = [name for name, case in ALL_CASES.items() if case.data != "short"]


@pytest.mark.parametrize("name", QUEUED)
def test_a_step_does_not_wait_for_the_gpu(name: str, models: Path):
    case = ALL_CASES[name]
    config = make_config(case, models / name, dtype="bfloat16")
    mesh = build_mesh("cuda", 1, 1)
    distiller = make_distiller(config, mesh)
    # The first step compiles and fills caches.
    distiller.step(micro_batches(case, 0, mesh, config.optimizer.micro_batch), 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = micro_batches(case, 1, mesh, config.optimizer.micro_batch)
        distiller.step(batches, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
