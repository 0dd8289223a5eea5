"""Open a model that was just written from its files alone, and compare it with what was meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

from megalard.checkpoint.build import check_complete
from megalard.checkpoint.open import open_model
from megalard.checkpoint.peft import ADAPTER_CONFIG
from megalard.errors import UserError
from megalard.model.rope import RopeTable, rope_table
from megalard.model.spec import ModelSpec, read_spec

# The description of RoPE may be spelled in several ways; the tables are compared instead.
_NOT_COMPARED = ("hf_config", "rope")


def reading_back(spec: ModelSpec, rope: RopeTable, directory: str | Path) -> Callable[[Path], None]:
    """Return a check for ``WriteOptions.check``.

    Args:
        spec, rope: the model that is meant, and its table of rotary positions.
        directory: the name that the directory will have, for errors.
    """
    return partial(_check, spec, rope, directory)


def _check(spec: ModelSpec, rope: RopeTable, directory: str | Path, folder: Path) -> None:
    """Refuse a directory that is read as another model.

    Raises:
        UserError: the directory is read as another model; the message names what differs.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        written = read_spec(folder)
    else:
        model = open_model(folder)
        check_complete(model.weights, model.spec)
        written = model.spec
    for field in fields(ModelSpec):
        meant, read = getattr(spec, field.name), getattr(written, field.name)
        if field.name not in _NOT_COMPARED and meant != read:
            raise _difference(directory, f"{field.name} is read as {read} and is {meant}")
    if not rope_table(written).same_as(rope):
        raise _difference(directory, f"RoPE is read as {written.rope} and is {spec.rope}")


def _difference(directory: str | Path, difference: str) -> UserError:
    return UserError(
        f"{directory} would be read as another model than was meant: its {difference}. Nothing was "
        "written there, and checkpoints are kept. This is a fault of megalard: report it with the "
        "model's config.json"
    )
