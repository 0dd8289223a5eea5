"""Cases of the campaign files: what a finished run leaves is changed and read again."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path

from tools import compare_runs
from tools.campaigns.material import Material
from tools.campaigns.mutations import changed, mutate, to_text
from tools.campaigns.trial import Trial, try_call, try_command

_RECORDS = (
    "metrics.jsonl",
    "metrics.jsonl",
    "evaluation.json",
    "evaluation.json",
    "summary.json",
    "run.json",
    "finished.json",
    "running.json",
    "student/config.json",
    "student/tokenizer_config.json",
    "holdout.json",
)
_LATER: tuple[tuple[str, object], ...] = (
    ("run.quantum", True),
    ("objective.relations.o", 1.0),
    ("galaxy", {"a": 1}),
    ("stages", {"a": {"rope": {"factor": 2}}}),
    ("streams", {"a": {"data": {"shuffle": 3}}}),
    ("optimizer.kind", "adamw"),
    ("parallel.pp", 2),
    ("rope.type", "galactic"),
    ("trainable.mode", "dora"),
    ("version", 7),
)


def try_record(rng: random.Random, material: Material, scratch: Path) -> tuple[str, Trial]:
    """Change the files of a finished run; report, compare, describe, evaluate and restart it."""
    run = material.copy("evaluated", scratch / "evaluated")
    names = [name for name in _RECORDS if (run / name).is_file()]
    changes = []
    for name in dict.fromkeys(rng.choices(names, k=rng.choice([1, 1, 2]))):
        changes.append(f"{name} {_change(rng, run / name)}")
    out = scratch / "out"
    commands: list[Callable[[], Trial]] = [
        lambda: try_command(["report", run]),
        lambda: try_command(["inspect", run, "--json"]),
        lambda: try_command(
            ["push", run, "--repo", "a/b", "--base-model", "c/d", "--card-only"],
        ),
        lambda: try_call(
            lambda: compare_runs.main(
                [str(run), str(material.folder / "evaluated"), "--output", str(out)]
            )
        ),
        lambda: try_command(material.evaluated_command(run)),
        lambda: try_command([*material.evaluated_command(run), "--preflight"]),
    ]
    for command in rng.sample(commands, 3):
        trial = command()
        if not trial.is_good:
            break
    return f"record: {'; '.join(changes)}", trial


def _change(rng: random.Random, path: Path) -> str:
    if path.suffix == ".jsonl" and rng.random() < 0.8:
        return _change_line(rng, path)
    if path.name in ("run.json", "finished.json") and rng.random() < 0.4:
        return _as_later_version(rng, path)
    return mutate(rng, path)


def _change_line(rng: random.Random, path: Path) -> str:
    """Change one line of a JSON Lines file."""
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    content, change = changed(rng, json.loads(lines[number]))
    lines[number] = rng.choice([to_text(content)] * 4 + ["", "{", lines[0], "\x00" * 100])
    path.write_text("\n".join(lines) + rng.choice(["\n", "", "\n\n"]))
    return f"line {number} {change}"


def _as_later_version(rng: random.Random, path: Path) -> str:
    """Add settings that a later version of megalard may have."""
    content = json.loads(path.read_text())
    added = rng.sample(_LATER, rng.choice([1, 2, 4]))
    for key, value in added:
        *sections, last = key.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        with contextlib.suppress(TypeError):
            place[last] = value
    path.write_text(json.dumps(content))
    return f"with {', '.join(key for key, _ in added)}"
