"""Leave out what takes most of the time of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import pytest

# A grey picture of one pixel.
SMALLEST_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)


def draw_no_evaluations(patch: pytest.MonkeyPatch) -> None:
    """Let evaluations write a file in place of a picture.

    A picture takes half a second to draw, after two seconds to import matplotlib in a new process.
    ``tests/evaluation/test_plots.py`` and ``tests/test_train.py`` look at pictures.
    """
    from megalard.evaluation import comparison
    from megalard.training import evaluator

    def draw(path: Path, *arguments: object) -> None:
        path.write_bytes(b"no picture")

    for module in (comparison, evaluator):
        patch.setattr(module, "draw", draw)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Let figures be made as always, and one pixel be saved in place of their drawing.

    Drawing takes four fifths of the time of a small run that writes a report.
    """
    from matplotlib.figure import Figure

    def save(figure: Figure, file: Path | IO[bytes], **options: object) -> None:
        if isinstance(file, Path):
            file.write_bytes(SMALLEST_PNG)
        else:
            file.write(SMALLEST_PNG)

    patch.setattr(Figure, "savefig", save)
