"""Describe a checkpoint: sizes, who wrote it, step, what was trained, and whether it is complete.

  megalard inspect CHECKPOINT             a sharded checkpoint or a run's checkpoint
  megalard inspect RUN                    every checkpoint of a run
  megalard inspect CHECKPOINT --tensors   every tensor and its slices too
  megalard inspect MODEL_DIR              a Hugging Face model or an adapter

The command reads every file to compare its checksum, and the files of the base model (and of the
teacher, if it is another model) that a run's checkpoint refers to. With --no-checksums it looks at
names and lengths only. --no-base leaves out the models that a checkpoint refers to. The exit status
is 0 if everything is complete and every recorded checksum holds, and 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megalard.errors import UserError, printable

NAME, HELP = "inspect", "describe a checkpoint, a run, a model or an adapter, and check it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "directory", type=Path, help="a checkpoint, a run's output directory, a model or an adapter"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor and its slices")
    parser.add_argument(
        "--no-checksums", action="store_true", help="do not read the files to compare checksums"
    )
    base = parser.add_mutually_exclusive_group()
    base.add_argument(
        "--base", type=Path, metavar="DIR", help="base model of a run's checkpoint, if it has moved"
    )
    base.add_argument(
        "--no-base", action="store_true", help="do not look for the files of base and teacher"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object; for a run its checkpoints are a list",
    )


def run(options: argparse.Namespace) -> int:
    """Inspect a directory and print what it contains."""
    from megalard.training.run_folder import has_finished, unfinished

    directory, problems = options.directory, {}
    try:
        folder, checkpoints = _find_checkpoints(directory)
        facts, is_good = {}, True
        if not checkpoints and has_finished(directory):
            facts, is_good = _inspect(directory / "student", options, problems)
            facts = {"run": "it has finished, and keeps no checkpoint"} | facts
            directory = directory / "student"
        elif not checkpoints:
            facts, is_good = _inspect(directory, options, problems)
    except UserError as error:
        checkpoints, facts, is_good = [], _unusable(error), False
    if not checkpoints:
        if options.json:
            print(json.dumps({"directory": str(directory), **facts}, indent=2))
        else:
            _print(directory, facts)
        return 0 if is_good else 1
    results = [(path, *_inspect(path, options, problems)) for path in checkpoints]
    newest = "the newest has a problem"
    if results[-1][2]:
        newest = f"the next start resumes from {checkpoints[-1].name}"
        if has_finished(folder.parent):
            newest = f"the run has finished, and its student is in {folder.parent / 'student'}"
    leftovers = unfinished(folder)
    if options.json:
        summary = {
            "checkpoints": [{"directory": str(path), **facts} for path, facts, _ in results],
            "unfinished": [str(path) for path in leftovers],
            "newest": newest,
        }
        print(json.dumps(summary, indent=2))
    else:
        for path, facts, _ in results:
            _print(path, facts)
        for path in leftovers:
            print(printable(f"{path}: a save that was not finished; the next start removes it"))
        number = len(checkpoints)
        print(f"{number} complete checkpoint{'' if number == 1 else 's'}; {newest}")
    return 0 if all(is_good for *_, is_good in results) else 1


def _find_checkpoints(directory: Path) -> tuple[Path, list[Path]]:
    """Return the directory of a run's checkpoints, and the checkpoints.

    There are none if the directory is itself a checkpoint or a model.
    """
    from megalard.checkpoint.sharded.manifest import is_checkpoint
    from megalard.files.reading import cannot_read
    from megalard.training.run_folder import checkpoints

    if is_checkpoint(directory):
        return directory, []
    folder = directory
    try:
        if (directory / "checkpoints").is_dir():
            folder = directory / "checkpoints"
        # In a run's output directory an exported student may have such a name too.
        return folder, [
            path
            for _, path in checkpoints(folder)
            if is_checkpoint(path) or not any(path.glob("model*.safetensors"))
        ]
    except OSError as error:
        raise cannot_read(folder, error) from None


def _inspect(directory: Path, options: argparse.Namespace, problems: dict) -> tuple[dict, bool]:
    """Return facts about one directory, and whether it is complete and its checksums hold.

    Args:
        problems: what is wrong with each base model so far, as the checkpoints of a run share them.
    """
    from megalard.checkpoint.inspection import describe_adapter, describe_model
    from megalard.checkpoint.peft import ADAPTER_CONFIG
    from megalard.checkpoint.sharded.manifest import is_checkpoint

    try:
        if is_checkpoint(directory):
            return _inspect_checkpoint(directory, options, problems)
        is_adapter = (directory / ADAPTER_CONFIG).is_file()
        return (describe_adapter if is_adapter else describe_model)(directory), True
    except UserError as error:
        return _unusable(error), False


def _unusable(error: Exception) -> dict:
    return {"complete": "no", "problem": str(error)}


def _inspect_checkpoint(
    directory: Path, options: argparse.Namespace, problems: dict
) -> tuple[dict, bool]:
    from megalard.checkpoint.inspection import describe_checkpoint, provenance_problem
    from megalard.checkpoint.sharded.read import ShardedWeights
    from megalard.progress import byte_bar

    weights = ShardedWeights(directory)
    facts, with_checksums = describe_checkpoint(weights.manifest), not options.no_checksums
    problem = None
    if with_checksums:
        with byte_bar("checksums", facts["bytes"]) as advance:
            try:
                weights.check_sums(progress=advance)
            except UserError as error:
                problem = str(error)
    facts["checksums"] = problem or ("hold" if with_checksums else "not compared")
    is_good = problem is None
    for role, note in (("base", weights.manifest.base), ("teacher", weights.manifest.teacher)):
        if note is None or options.no_base:
            continue
        place = (role == "base" and options.base) or Path(note["path"])
        key = json.dumps([str(place), note["files"]])
        if key not in problems:
            size = sum(file["size"] for file in note["files"].values()) if with_checksums else 0
            with byte_bar(f"{role} model", size) as advance:
                problems[key] = provenance_problem(
                    note, place, with_checksums, f"{role} model", advance
                )
        outcome = "checksums hold" if with_checksums else "checksums not compared"
        facts[f"{role} files"] = problems[key] or f"are there, {outcome}"
        is_good = is_good and problems[key] is None
    if options.tensors:
        facts["slices"] = weights.manifest.tensors
    return facts, is_good


def _print(directory: Path, facts: dict) -> None:
    """Print facts about one directory, each on one line."""
    if "problem" in facts:
        print(printable(f"{directory}: NOT USABLE: {facts['problem']}"))
        return
    print(printable(f"{directory}"))
    for key, value in facts.items():
        if key != "slices":
            print(f"  {key:<12} {printable(str(value))}")
    for name, tensor in facts.get("slices", {}).items():
        slices = ", ".join(f"{c['file']} at {c['offsets']}" for c in tensor["chunks"])
        print(printable(f"  {name}  {tensor['dtype']} {tensor['shape']}  {slices}"))
