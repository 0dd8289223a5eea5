"""Settings that have to stand before anything imports Triton or uses the GPU."""

import os

import pytest
import torch

if torch.cuda.is_available():
    # read at the first product only, and needed by the tests with run.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """How many processes ``tests/run.sh`` starts: one alone where tests would share a GPU."""
    return 0 if torch.cuda.is_available() else None
