"""The Hopper kernels compile without a GPU.

This covers the device code of ``hopper.forward``, ``forward_tile`` and ``softmax``, and of
``hopper.backward``, ``row_gradient``, ``column_reducer`` and ``column_buffer``. Its results
are tested on a GPU, in test_hopper_gpu.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalard.kernels.relation_kl.hopper import backend


@pytest.mark.skipif(backend.hopper_forward is None, reason=str(backend.UNAVAILABLE))
def test_both_kernels_compile_for_hopper():
    """Another process compiles, for a target without a device, because this one may interpret."""
    script = Path(__file__).with_name("compile_hopper.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(script.parents[2])
    run = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
