"""Tells what is in a checkpoint: sizes, who wrote it, step, what was trained, whether it is whole.

    python tools/inspect_checkpoint.py CHECKPOINT             a sharded checkpoint or a run's
    python tools/inspect_checkpoint.py RUN                    every checkpoint of a run
    python tools/inspect_checkpoint.py CHECKPOINT --tensors   every tensor and its slices too
    python tools/inspect_checkpoint.py MODEL_DIR              a Hugging Face model or an adapter

Reads every file to compare its checksum, those of the base model (and of the teacher, where it is
another) a run's checkpoint refers to as well; --no-checksums looks at names and lengths only,
--no-base leaves the models it refers to out. Exit status: 0 everything is complete and every
recorded checksum holds, 1 something is not.
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
    parser.add_argument(
        "directory", type=Path, help="a checkpoint, a run's output directory, a model or an adapter"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor and its slices")
    parser.add_argument(
        "--no-checksums", action="store_true", help="do not read the files to compare checksums"
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="base model of a run's checkpoint, if it has moved"
    )
    parser.add_argument(
        "--no-base", action="store_true", help="do not look for the base's and teacher's files"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object; a run's has its checkpoints in a list",
    )
    options = parser.parse_args(arguments)
    if options.no_base and options.base:
        parser.error("--no-base leaves the base model out, which --base DIR gives")
    return options


def inspect(directory: Path, options: argparse.Namespace, bases: dict) -> tuple[dict, bool]:
    """What is in one directory, and whether it is complete and its checksums hold.

    Args:
        bases: what was found wrong with base models so far, as the checkpoints of a run share them.
    """
    from megalard.checkpoint.peft import ADAPTER_CONFIG
    from megalard.checkpoint.sharded.manifest import is_checkpoint
    from megalard.errors import UserError

    try:
        if is_checkpoint(directory):
            return inspect_checkpoint(directory, options, bases)
        from megalard.checkpoint.inspect import describe_adapter, describe_model

        adapter = (directory / ADAPTER_CONFIG).is_file()
        return (describe_adapter if adapter else describe_model)(directory), True
    except UserError as error:
        return _unusable(error), False


def _unusable(error: Exception) -> dict:
    return {"complete": "no", "problem": str(error)}


def inspect_checkpoint(
    directory: Path, options: argparse.Namespace, bases: dict
) -> tuple[dict, bool]:
    """The same of a directory with a manifest."""
    from megalard.checkpoint.inspect import base_problem, describe
    from megalard.checkpoint.sharded.save_load import ShardedWeights
    from megalard.errors import UserError
    from megalard.progress import progress_bar

    weights = ShardedWeights(directory)
    facts, sums = describe(weights.manifest), not options.no_checksums
    problem = None
    if sums:
        with progress_bar("checksums", facts["bytes"]) as advance:
            try:
                weights.check_sums(progress=advance)
            except UserError as error:
                problem = str(error)
    facts["checksums"] = problem or ("hold" if sums else "not compared")
    good = problem is None
    for whose, note in (("base", weights.manifest.base), ("teacher", weights.manifest.teacher)):
        if note is None or options.no_base:
            continue
        place = (whose == "base" and options.base) or Path(note["path"])
        key = json.dumps([str(place), note["files"]])
        if key not in bases:
            size = sum(file["size"] for file in note["files"].values())
            with progress_bar(f"{whose} model", size if sums else 0) as advance:
                bases[key] = base_problem(note, place, sums, f"{whose} model", advance)
        there = "are there, checksums hold" if sums else "are there, checksums not compared"
        facts[f"{whose} files"] = bases[key] or there
        good = good and bases[key] is None
    if options.tensors:
        facts["slices"] = weights.manifest.tensors
    return facts, good


def show(directory: Path, facts: dict) -> None:
    """Print what is in one directory, for people."""
    if "problem" in facts:
        print(f"{directory}: NOT USABLE: {facts['problem']}")
        return
    print(f"{directory}")
    for key, value in facts.items():
        if key != "slices":
            print(f"  {key:<12} {value}")
    for name, tensor in facts.get("slices", {}).items():
        places = ", ".join(f"{c['file']} at {c['offsets']}" for c in tensor["chunks"])
        print(f"  {name}  {tensor['dtype']} {tensor['shape']}  {places}")


def find_checkpoints(directory: Path) -> tuple[Path, list[Path]]:
    """The folder of a run's checkpoints, and them; none where the directory is one itself."""
    from megalard.checkpoint.sharded.manifest import is_checkpoint
    from megalard.files.safetensors import cannot_read
    from megalard.training.run_folder import checkpoints

    if is_checkpoint(directory):
        return directory, []
    folder = directory
    try:
        if (directory / "checkpoints").is_dir():
            folder = directory / "checkpoints"
        # in a run's own directory a step's export may have such a name
        return folder, [
            path
            for _, path in checkpoints(folder)
            if is_checkpoint(path) or not any(path.glob("model*.safetensors"))
        ]
    except OSError as error:
        raise cannot_read(folder, error) from None


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from megalard.errors import UserError
    from megalard.training.run_folder import unfinished

    directory, bases = options.directory, {}
    try:
        folder, found = find_checkpoints(directory)
        facts, good = ({}, True) if found else inspect(directory, options, bases)
    except UserError as error:
        found, facts, good = [], _unusable(error), False
    if not found:
        if options.json:
            print(json.dumps({"directory": str(directory), **facts}, indent=2))
        else:
            show(directory, facts)
        return 0 if good else 1
    results = [inspect(path, options, bases) for path in found]
    good = [is_good for _, is_good in results]
    newest = "the newest has a problem"
    if good[-1]:
        newest = f"the next start goes on from {found[-1].name}"
    left = unfinished(folder)
    if options.json:
        listed = [
            {"directory": str(path), **facts}
            for path, (facts, _) in zip(found, results, strict=True)
        ]
        summary = {
            "checkpoints": listed,
            "unfinished": [str(path) for path in left],
            "newest": newest,
        }
        print(json.dumps(summary, indent=2))
        return 0 if all(good) else 1
    for path, (facts, _) in zip(found, results, strict=True):
        show(path, facts)
    for path in left:
        print(f"{path}: a save that was not finished; the next start removes it")
    print(f"{len(found)} complete checkpoints; {newest}")
    return 0 if all(good) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
