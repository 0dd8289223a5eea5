"""Settings that have to stand before anything imports Triton or uses the GPU."""

import os

import pytest
import torch

if torch.cuda.is_available():
    # read at the first product only, and needed by the tests with run.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """How many processes ``tests/run.sh`` starts: one alone where tests would share a GPU."""
    return 0 if torch.cuda.is_available() else None
