"""One tiny job, and runs that are made once for all tests that look at them."""

from __future__ import annotations

import pytest

from tests.settings.tiny_run import make_tiny_job, tiny_run


@pytest.fixture(autouse=True)
def quick(no_pictures, no_drawing):
    """Draw nothing: a picture takes longer than a tiny run."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_tiny_job(tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def run(job, tmp_path_factory):
    """A function that returns the run with some overrides."""
    runs = {}

    def run_once(*overrides: str):
        if overrides not in runs:
            output = tmp_path_factory.mktemp("run") / "output"
            runs[overrides] = tiny_run(job, output, overrides)
        return runs[overrides]

    return run_once
