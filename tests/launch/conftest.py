"""A job for the launch scripts, and the run that they must repeat."""

from __future__ import annotations

import pytest

from tests.jobs import make_job, train
from tests.launch.nodes import run_settings, started_nodes
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job in a folder whose name has to be quoted."""
    return make_job(tmp_path_factory.mktemp("it's a job"))


@pytest.fixture(scope="module")
def uninterrupted(job):
    """The run of two ranks, which no launcher started."""
    run_ranks(2, train, run_settings(job, job / "uninterrupted"))
    return job / "uninterrupted"


@pytest.fixture
def start():
    """A function that starts a script as a node; see ``started_nodes``."""
    with started_nodes() as start:
        yield start
