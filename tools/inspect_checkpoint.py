"""Tells what is in a checkpoint: sizes, who wrote it, step, what was trained, whether it is whole.

    python tools/inspect_checkpoint.py CHECKPOINT             a sharded checkpoint or a run's
    python tools/inspect_checkpoint.py RUN                    every checkpoint of a run
    python tools/inspect_checkpoint.py CHECKPOINT --tensors   every tensor and its slices too

Reads every file to compare its checksum; --no-checksums looks at names and lengths only. Exit
status: 0 everything is complete and every checksum holds, 1 something is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="a checkpoint, or a run's output directory")
    parser.add_argument("--tensors", action="store_true", help="list every tensor and its slices")
    parser.add_argument(
        "--no-checksums", action="store_true", help="do not read the files to compare checksums"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a checkpoint")
    return parser.parse_args(arguments)


def inspect(directory: Path, options: argparse.Namespace) -> bool:
    """Print one checkpoint; gives whether it is complete and its checksums hold."""
    from megalard.checkpoint.sharded import ShardedWeights
    from megalard.checkpoint.source import describe
    from megalard.errors import UserError
    from megalard.progress import progress_bar

    try:
        weights = ShardedWeights(directory)
    except UserError as error:
        print(f"{directory}: NOT USABLE: {error}")
        return False
    facts = describe(weights.manifest)
    problem = None
    if not options.no_checksums:
        with progress_bar("checksums", facts["bytes"]) as advance:
            try:
                weights.check_sums(progress=advance)
            except UserError as error:
                problem = str(error)
    facts["checksums"] = problem or ("not compared" if options.no_checksums else "hold")
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        print(f"{directory}")
        for key, value in facts.items():
            print(f"  {key:<12} {value}")
    if options.tensors:
        for name, tensor in weights.manifest.tensors.items():
            places = ", ".join(f"{c['file']} at {c['offsets']}" for c in tensor["chunks"])
            print(f"  {name}  {tensor['dtype']} {tensor['shape']}  {places}")
    return problem is None


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from megalard.checkpoint.manifest import is_checkpoint
    from megalard.checkpoint.run_folder import checkpoints, unfinished

    directory = options.directory
    folder = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    found = [path for _, path in checkpoints(folder)]
    if is_checkpoint(directory) or not found:
        return 0 if inspect(directory, options) else 1
    good = [inspect(path, options) for path in found]
    for path in unfinished(folder):
        print(f"{path}: a save that was not finished; the next start removes it")
    newest = (
        f"the next start goes on from {found[-1].name}" if good[-1] else "the newest is damaged"
    )
    print(f"{len(found)} complete checkpoints; {newest}")
    return 0 if all(good) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
