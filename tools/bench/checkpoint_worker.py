"""Do one piece of work of ``tools.bench.checkpoint``, which measures the time and memory of it.

    python -m tools.bench.checkpoint_worker save --shape tiny --directory DIR

``make`` writes a Hugging Face directory with random weights. ``save`` and ``load`` write and read
the sharded state of the same model, and print the seconds that this took as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from megalard import cli
from tools import command_line
from tools.bench.shapes import add_shape

_WINDOW = 4096


def main(arguments: list[str] | None = None) -> int:
    """Do the work; return the exit status."""
    parser = command_line.make_parser("tools.bench.checkpoint_worker", __doc__)
    parser.add_argument("work", choices=("make", "save", "load"), help="the work to do")
    add_shape(parser)
    parser.add_argument(
        "--directory",
        type=Path,
        required=True,
        metavar="DIR",
        help="the directory to write or to read",
    )
    options = parser.parse_args(arguments)
    return cli.run(lambda: run(options.work, options.shape, options.directory))


def run(work: str, shape: str, directory: Path) -> None:
    """Do one piece of work."""
    import torch

    from megalard.checkpoint.huggingface import write_huggingface
    from megalard.checkpoint.sharded.manifest import written_by
    from megalard.checkpoint.sharded.read import ShardedWeights
    from megalard.checkpoint.sharded.save_load import load_sharded, save_sharded
    from megalard.checkpoint.write_options import WriteOptions
    from megalard.parallel.agreement import checked_meanwhile
    from megalard.parallel.mesh import SINGLE, build_mesh
    from tools.bench.random_model import RandomWeights, random_config, random_spec

    random = RandomWeights(random_spec(shape, _WINDOW), shape)
    config = random_config(shape, _WINDOW)
    if work == "make":
        write_huggingface(directory, random, config, WriteOptions())
        return
    state = {name: torch.zeros(random.shape(name), dtype=torch.bfloat16) for name in random.names()}
    if work == "save":
        for name, tensor in state.items():
            tensor.copy_(random.read(name))
    sections = {"kind": "model", "config": config, "base": None, "trained": None, "training": None}
    sections["written_by"] = written_by(build_mesh("cpu", 1))
    start = time.perf_counter()
    if work == "save":
        save_sharded(directory, state, sections, SINGLE, WriteOptions())
    else:
        weights = ShardedWeights(directory)
        with checked_meanwhile(weights.check_sums, SINGLE) as wait_for_checksums:
            load_sharded(weights, state, SINGLE)
            wait_for_checksums()
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    sys.exit(main())
