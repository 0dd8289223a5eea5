"""Settings that must be made before anything imports Triton or uses the GPU."""

from __future__ import annotations

import gc
import importlib.util
import os
from functools import cache

import pytest
import torch

from tests.pictures import draw_no_evaluations, draw_nothing

if torch.cuda.is_available():
    # Tests with run.deterministic need this variable, which cuBLAS reads once, at its first matrix
    # product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("tests.quick_interpreter")

# Files and folders that take ten CPU seconds or more, the longest first. They begin first, so that
# no process is left with one of them when the others have nothing to do any more.
SLOW = (
    "tests/parity/test_parity.py",
    "tests/training/test_shard_weights.py",
    "tests/launch/test_nodes.py",
    "tests/launch/test_signals.py",
    "tests/tools/study/test_restoration.py",
    "tests/settings/test_run_settings.py",
    "tests/kernels/test_op.py",
    "tests/training/test_resume.py",
    "tests/tools/campaigns/test_campaigns.py",
    "tests/checkpoint/sharded/test_save_load.py",
    "tests/estimate/test_state.py",
    "tests/training/test_validator.py",
    "tests/training/test_killed_runs.py",
    "tests/training/test_export.py",
    "tests/evaluation/test_lm_eval.py",
    "tests/test_launcher.py",
    "tests/estimate/test_passes.py",
    "tests/test_packaging.py",
    "tests/checkpoint/test_peft.py",
    "tests/test_train.py",
    "tests/training/test_full_disks.py",
    "tests/model/test_decoder.py",
    "tests/tools/bench/test_checkpoint.py",
    "tests/launch/test_slurm.py",
    "tests/report/",
    "tests/commands/test_evaluate.py",
    "tests/distill/terms/",
    "tests/tools/",
    "tests/settings/",
    "tests/training/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order slow files first, and skip tests marked ``gpu`` where there is no GPU."""

    @cache
    def place(file: str) -> int:
        matches = (i for i, name in enumerate(SLOW) if file.startswith(name))
        return next(matches, len(SLOW))

    items.sort(key=lambda item: place(item.nodeid.partition("::")[0]))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import the tests without the garbage collector, which ignores the imported objects later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture
def no_pictures(monkeypatch):
    """Let evaluations write a file in place of a picture; see ``draw_no_evaluations``."""
    draw_no_evaluations(monkeypatch)


@pytest.fixture
def no_drawing(monkeypatch):
    """Draw nothing of the figures that the code under test makes; see ``draw_nothing``."""
    draw_nothing(monkeypatch)
