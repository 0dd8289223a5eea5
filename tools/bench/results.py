"""How benchmarks report: a table that grows row by row, and one form of JSON."""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from megalard import __version__

if TYPE_CHECKING:
    import torch


class Table:
    """A table of right-aligned columns that prints each row as soon as it is known.

    Args:
        headings: one per column: its text, or its text and the width of a longer cell. Every column
            has at least ``WIDTH`` characters.
    """

    WIDTH = 9

    def __init__(self, *headings: str | tuple[str, int]):
        pairs = [(heading, 0) if isinstance(heading, str) else heading for heading in headings]
        self._widths = [max(len(text), width, self.WIDTH) for text, width in pairs]
        self.row(*(text for text, _ in pairs))

    def row(self, *cells: object) -> None:
        """Print one row; columns that are not given stay empty."""
        texts = (f"{cell!s:>{width}}" for cell, width in zip(cells, self._widths, strict=False))
        print("  ".join(texts).rstrip(), flush=True)


def describe_environment(device: torch.device | None = None) -> dict[str, str]:
    """Return the name of the device and the versions of the libraries that results depend on.

    Args:
        device: the CPU when not given, for benchmarks that do not import torch.
    """
    name = "cpu"
    if device is not None and device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    facts = {"device": name, "megalard": __version__}
    for library in ("torch", "triton", "transformers"):
        try:
            facts[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            facts[library] = "not installed"
    return facts


def print_environment(facts: dict[str, str]) -> None:
    """Print an environment on one line."""
    libraries = ", ".join(
        f"{name} {version}" for name, version in facts.items() if name != "device"
    )
    print(f"{facts['device']}; {libraries}", flush=True)


def write_json(
    path: Path,
    environment: dict[str, str],
    options: argparse.Namespace,
    results: list[dict],
    **facts: object,
) -> None:
    """Write results with everything that they depend on.

    Args:
        facts: further entries of the JSON object, such as the measurement of a reference.
    """
    given = {name: _plain(value) for name, value in vars(options).items() if name != "json"}
    content = {"environment": environment, "options": given, **facts, "results": results}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
