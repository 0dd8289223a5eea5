"""Damage the files that a run resumes from: the damage is refused or changes nothing.

  python -m tools.campaigns.damage --count 500 --seed 0

A run that stopped halfway, a token store, the model that the run started from and a sharded model
are damaged: a flipped bit, a file that is missing, empty or cut, or a file of another model,
another step or another text. Then the run is resumed, or the model exported. Either the command
refuses in one sentence, or its result equals the result from undamaged files bit for bit. Anything
else is printed and gives status 1.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from tools.campaigns.campaign import Campaign
from tools.campaigns.material import Material, make_material
from tools.campaigns.tally import Outcome
from tools.campaigns.trial import Trial, try_command

Damage = Callable[[random.Random, Path, Path], str]


def _flip(rng: random.Random, path: Path, foreign: Path) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        return "as it is"
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"a flipped bit at {place} of {len(content)}"


def _remove(rng: random.Random, path: Path, foreign: Path) -> str:
    path.unlink()
    return "missing"


def _cut(rng: random.Random, path: Path, foreign: Path) -> str:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) or 1)])
    return "cut"


def _replace(rng: random.Random, path: Path, foreign: Path) -> str:
    if not foreign.is_file():
        return _flip(rng, path, foreign)
    shutil.copyfile(foreign, path)
    return f"from {foreign.parent.name}"


_DAMAGES: tuple[Damage, ...] = (_flip, _flip, _flip, _remove, _cut, _replace, _replace)


def same_weights(a: Path, b: Path) -> bool:
    """Whether two model directories have the same tensors, bit for bit."""
    if not (a / "model.safetensors").is_file():
        return False
    tensors_a, tensors_b = (load_file(path / "model.safetensors") for path in (a, b))
    return tensors_a.keys() == tensors_b.keys() and all(
        torch.equal(tensors_a[name].view(torch.uint8), tensors_b[name].view(torch.uint8))
        for name in tensors_a
    )


def _try_run(rng: random.Random, material: Material, scratch: Path) -> tuple[str, Trial, bool]:
    """Damage a run that stopped after step 4, or its model; resume it."""
    output, model = scratch / "run", scratch / "model"
    material.unfinished_run(output)
    material.copy("model", model)
    newest = output / "checkpoints" / "step-000004"
    # The resumed run reads the model's files, the newest checkpoint and its tokens.
    files = [*_files(newest), *_files(newest), *_files(output), *_files(model)]
    path = rng.choice(files)
    if path.parent == newest:
        foreign = newest.with_name("step-000002") / path.name
    elif path.parent == model:
        foreign = material.folder / "other" / path.name
    else:
        foreign = material.folder / "other-run" / path.relative_to(output)
    change = rng.choice(_DAMAGES)(rng, path, foreign)
    trial = try_command(material.command(output, f"model.teacher={model}"))
    is_same = trial.kind != "done" or same_weights(
        output / "student", material.folder / "run" / "student"
    )
    return f"{path.relative_to(scratch)} {change}", trial, is_same


def _try_model(rng: random.Random, material: Material, scratch: Path) -> tuple[str, Trial, bool]:
    """Damage a sharded model; export it."""
    model, out = material.copy("sharded", scratch / "sharded"), scratch / "out"
    path = rng.choice(_files(model))
    change = rng.choice(_DAMAGES)(rng, path, material.folder / "other-sharded" / path.name)
    trial = try_command(["convert", "export", model, out])
    is_same = trial.kind != "done" or same_weights(out, material.folder / "model")
    return f"{path.relative_to(scratch)} {change}", trial, is_same


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _outcomes(
    seed: int, material: Material, scratch: Path, options: argparse.Namespace
) -> Iterator[Outcome]:
    rng = random.Random(seed)
    case, trial, is_same = rng.choice((_try_run, _try_model))(rng, material, scratch)
    kind = trial.kind if is_same else "silently different"
    kind = "no effect" if kind == "done" else kind
    yield Outcome(kind, trial.is_good and is_same, case, trial.detail)


def _prepare_material(folder: Path, options: argparse.Namespace) -> Material:
    material = make_material(folder)
    _make_other_run(material)
    return material


def _make_other_run(material: Material) -> None:
    """Run the job once more on another text, to get files that do not belong to the first run."""
    text = material.folder / "other.txt"
    text.write_text(" ".join(reversed((material.folder / "text.txt").read_text().split())))
    trial = try_command(material.command(material.folder / "other-run", f"data.paths={text}"))
    assert trial.kind == "done", trial


CAMPAIGN = Campaign(__doc__, 500, _outcomes, _prepare_material)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; return the exit status."""
    return CAMPAIGN.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
