"""Change files of models, checkpoints, runs and texts, and read them with the commands.

  python -m tools.campaigns.files --count 20000 --seed 0
  python -m tools.campaigns.files --count 1000000 --minutes 30

A case changes one or two files: JSON with other values, headers of safetensors and .npy files,
manifests and token stores that are signed anew, flipped bits, cut files, links, pipes and devices.
Each command must succeed or refuse in one sentence. The campaign prints each traceback, wait of
more than a minute, use of more memory than a small model takes, and control character in the
output, and then exits with status 1. The campaign damage checks that a changed file is never taken
for the original.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.campaigns.campaign import Campaign
from tools.campaigns.drawn_tokenizers import make_piece_tokenizer
from tools.campaigns.material import Material, make_material
from tools.campaigns.mutations import mutate, sign_manifest, sign_store
from tools.campaigns.records import try_record
from tools.campaigns.tally import Outcome
from tools.campaigns.texts import make_texts, try_text
from tools.campaigns.trial import Trial, try_call, try_command

# Memory in addition to what the process has when the cases begin. A small model takes some MiB.
_MEMORY_BYTES = 4 * 2**30

TARGETS = (
    *("model", "model", "indexed", "sharded", "sharded", "adapter", "run", "run", "pieces"),
    *("table", "text", "text", "record", "record"),
)


_PLANNED = ("--optimizer.steps", "3", "--data.context_length", "32")


def try_case(seed: int, material: Material, scratch: Path) -> tuple[str, Trial]:
    """Draw a case and run its commands; return its description, and the first bad or last trial."""
    rng = random.Random(seed)
    target = rng.choice(TARGETS)
    if target == "table":
        return _try_table(rng, scratch)
    if target == "text":
        return try_text(rng, material, scratch)
    if target == "record":
        return try_record(rng, material, scratch)
    folder = scratch / target
    if target == "run":
        material.unfinished_run(folder)
    else:
        material.copy(target, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if target == "run" and rng.random() < 0.5:
        files = [path for path in files if "step-000002" not in str(path)]
    changes = []
    for path in rng.sample(files, rng.choice([1, 1, 1, 2])):
        change = mutate(rng, path)
        changes.append(f"{path.relative_to(folder)} {change}")
    if rng.random() < 0.7:
        for path in folder.rglob("manifest.json"):
            sign_manifest(path)
        for path in folder.rglob("meta.json"):
            sign_store(path.parent)
    return f"{target}: {'; '.join(changes)}", _read(rng, target, folder, material, scratch)


def _read(
    rng: random.Random, target: str, folder: Path, material: Material, scratch: Path
) -> Trial:
    commands: list[list] = [["inspect", folder]]
    if target == "run":
        commands.append(material.command(folder))
    else:
        text = ["--logits", material.folder / "text.txt", "--tokens", "16"]
        commands.append(["verify", folder, material.folder / "model", *text])
        commands.append(
            rng.choice(
                (
                    ["convert", "import", folder, scratch / "sharded-copy"],
                    ["convert", "export", folder, scratch / "copy"],
                    _prepare(material.folder / "text.txt", folder, scratch),
                    _evaluate(folder, material.folder / "text.txt", scratch),
                    ["plan", "--model", folder, "--gpus", "2 x H100 80GB", *_PLANNED],
                )
            )
        )
    for command in commands:
        trial = try_command(command)
        if not trial.is_good:
            break
    return trial


def _try_table(rng: random.Random, scratch: Path) -> tuple[str, Trial]:
    import json

    import numpy as np

    from megalard.model.rope import read_table

    values = [1.0, 0.3, 0.02, 0.0005]
    path = scratch / rng.choice(["t.json", "t.npy", "t.txt"])
    if path.suffix == ".npy":
        np.save(path, np.array(values))
    else:
        path.write_text(
            json.dumps(values) if path.suffix == ".json" else "\n".join(map(str, values))
        )
    change = mutate(rng, path)

    def read() -> int:
        from megalard import cli

        def call() -> None:
            read_table(str(path), 8)

        return cli.run(call)

    return f"table: {path.name} {change}", try_call(read)


def _evaluate(model: Path, text: Path, scratch: Path) -> list:
    words = ["--lengths", "16", "--max-tokens", "32", "--tasks", "--device", "cpu"]
    return ["evaluate", model, "--text", text, *words, "--output", scratch / "evaluation"]


def _prepare(text: Path, model: Path, scratch: Path) -> list:
    return ["prepare", text, "--model", model, "--output", scratch / "tokens"]


def _limit_memory() -> None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmSize:"):
            used_bytes = int(line.split()[1]) * 1024
            limit = used_bytes + _MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _prepare_material(folder: Path, options: argparse.Namespace) -> Material:
    material = make_material(folder)
    material.add_evaluated_run()
    make_texts(material)
    material.copy("model", folder / "pieces")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "pieces" / name).unlink()
    make_piece_tokenizer(folder / "pieces")
    return material


def _outcomes(
    seed: int, material: Material, scratch: Path, options: argparse.Namespace
) -> Iterator[Outcome]:
    case, trial = try_case(seed, material, scratch)
    yield Outcome(trial.kind, trial.is_good, case, trial.detail)


CAMPAIGN = Campaign(__doc__, 20_000, _outcomes, _prepare_material, _limit_memory)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; return the exit status."""
    return CAMPAIGN.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
