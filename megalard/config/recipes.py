"""The recipes that come with megalard: configuration files that ``--config NAME`` finds by name."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def recipes() -> dict[str, Path]:
    """Return the files of all recipes, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def find_config(name: str) -> str:
    """Return the path of a configuration file that is given by its path or as a recipe's name."""
    path = recipes().get(name)
    return str(path) if path is not None and not Path(name).exists() else name


def title(path: Path) -> str:
    """Return the first sentence of a recipe's opening comment."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].rstrip(".:")
