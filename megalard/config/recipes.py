"""The recipes that come with megalard: configuration files that ``--config NAME`` finds by name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from megalard.errors import UserError, shown

_FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def recipes() -> dict[str, Path]:
    """Return the files of all recipes, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def find_config(name: str) -> str:
    """Return the path of a configuration file that is given by its path or as a recipe's name.

    Raises:
        UserError: the name is not a path, and no recipe has it; the nearest recipe is named.
    """
    paths = recipes()
    if os.sep in name or os.path.exists(name):
        return name
    if name in paths:
        return str(paths[name])
    (nearest,) = difflib.get_close_matches(name[:100], paths, n=1, cutoff=0.0)
    raise UserError(
        f"--config {shown(name)} is neither a file nor a recipe: give a file, or a recipe that "
        f"`megalard train --help` lists, such as {nearest}"
    )


def title(path: Path) -> str:
    """Return the first sentence of a recipe's opening comment."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].rstrip(".:")
