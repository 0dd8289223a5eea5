"""Draw the time and the memory of a micro-step, of the authors' implementation and of megalard.

  python -m tools.bench.authors_plot docs/figures/authors.json docs/speed.png

The first file is what ``python -m tools.bench.authors --json FILE`` writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megalard import cli
from megalard.evaluation.plots import COLORS
from tools import command_line

LABELS = {"authors": "authors' code", "megalard": "megalard"}
PANELS = {"seconds": "seconds per micro-step", "peak_gib": "peak memory, GiB"}


def main(arguments: list[str] | None = None) -> int:
    """Draw the picture; return the exit status."""
    parser = command_line.make_parser("tools.bench.authors_plot", __doc__)
    parser.add_argument("results", type=Path, metavar="FILE.json", help="the measurement")
    parser.add_argument("picture", type=Path, metavar="FILE.png", help="where it is drawn")
    options = parser.parse_args(arguments)
    return cli.run(lambda: draw(json.loads(options.results.read_text()), options.picture))


def draw(content: dict, picture: Path) -> None:
    """Draw one panel for the time and one for the memory."""
    from matplotlib.figure import Figure

    times, options = content["results"][0]["time"], content["options"]
    figure = Figure(figsize=(9, 2.0), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        values = [times[name][key] or 0.0 for name in LABELS]
        bars = axes.barh([*LABELS.values()], values, color=COLORS[1::-1])
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.15)
        axes.invert_yaxis()
    device = content["environment"]["device"]
    shape = f"{options['shape']}, {options['tokens']} tokens, LoRA rank {options['lora_rank']}"
    figure.suptitle(f"{shape}, {device}", fontsize=10)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
