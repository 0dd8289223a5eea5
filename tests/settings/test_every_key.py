"""Every key of the configuration has a test of its name in this folder."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

from megalard.config.fields import default_of
from megalard.config.schema import Config, StageConfig, StreamConfig

FOLDER = Path(__file__).parent


def keys_of(cls: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of all settings; sections of a stream or a stage are one key."""
    keys = []
    for field in dataclasses.fields(cls):
        default = default_of(field)
        if dataclasses.is_dataclass(default) and cls not in (StreamConfig, StageConfig):
            keys += keys_of(type(default), f"{prefix}{field.name}.")
        else:
            keys.append(prefix + field.name)
    return keys


def every_key() -> list[str]:
    named = ("streams", "stages")
    keys = [key for key in keys_of(Config) if key not in named]
    return keys + keys_of(StreamConfig, "streams.") + keys_of(StageConfig, "stages.")


def names_of_tests(folder: Path) -> set[str]:
    names = set()
    for file in folder.glob("test_*.py"):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        names |= {node.name for node in body if isinstance(node, ast.FunctionDef)}
    return names


def test_every_key_has_a_test():
    tests = names_of_tests(FOLDER)
    keys = every_key()
    assert len(keys) > 70
    assert [key for key in keys if f"test_{key.replace('.', '_')}" not in tests] == []


def test_a_key_without_a_test_is_noticed(tmp_path):
    (tmp_path / "test_x.py").write_text("def test_model_teacher(run): ...\n")
    assert names_of_tests(tmp_path) == {"test_model_teacher"}
    assert "model.teacher" in every_key() and "streams.weight" in every_key()
