"""A job's configuration as the modules of training take it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megalard.config.file import load_config
from megalard.config.schema import Config
from megalard.parallel.mesh import Mesh, build_mesh
from megalard.training.output import Output
from megalard.training.plan import Plan, make_plan
from megalard.training.stages import Stage, stages_of
from tests.jobs import arguments, make_job


@dataclass(frozen=True)
class Planned:
    """A run that is planned and has not begun."""

    config: Config
    mesh: Mesh
    plan: Plan
    stages: list[Stage]
    output: Output


@pytest.fixture(scope="session")
def small_job(tmp_path_factory):
    """A job that tests only read."""
    return make_job(tmp_path_factory.mktemp("small-job"))


@pytest.fixture(autouse=True)
def quick(no_pictures):
    """Draw nothing: a picture takes longer than a tiny run."""


@pytest.fixture
def planned(small_job, tmp_path):
    """A function that plans a run of the small job with some overrides."""

    def plan(*options: str) -> Planned:
        config = load_config(None, arguments(small_job, tmp_path / "output", *options))
        mesh = build_mesh("cpu", 1)
        output = Output(tmp_path / "output")
        return Planned(config, mesh, make_plan(config, mesh), stages_of(config), output)

    return plan
