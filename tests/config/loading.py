"""Load configurations with the keys that every run must give."""

from __future__ import annotations

from megalard.config.file import load_config
from megalard.config.schema import Config
from tests.command_line import user_error

REQUIRED = ["--model.teacher", "t", "--data.paths", "[a, b]", "--run.output", "out"]


def load(*overrides: str, path: str | None = None) -> Config:
    """Load a configuration with the required keys and some overrides."""
    return load_config(path, [*REQUIRED, *overrides])


def refusal(*overrides: str, path: str | None = None) -> str:
    """Return the sentence with which a configuration is refused."""
    return user_error(load, *overrides, path=path)
