"""Give every command and script odd values: each is taken, or refused in one sentence.

  python -m tools.campaigns.arguments --count 3000 --seed 0

A case is one command line: the usual arguments of a command of megalard, of a tool or of
launch/train.sh, of which some are replaced by odd values, left out, given twice or joined by
others. A traceback, a wait of more than a minute and control characters in what is printed are
printed and give status 1.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.campaigns.campaign import Campaign
from tools.campaigns.drawn_settings import draw_tree, write_yaml
from tools.campaigns.material import Material, make_material
from tools.campaigns.tally import Outcome
from tools.campaigns.trial import Trial, judge, try_call, try_command

_TRAIN = Path(__file__).parents[2] / "launch" / "train.sh"

VALUES = (
    "",
    " ",
    "-",
    "--",
    "---",
    "=",
    "-1",
    "0",
    "1",
    "3",
    "2.5",
    "1e9",
    "1e400",
    "nan",
    "inf",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "٣",
    "²",
    "4K",
    "K",
    "-4K",
    "4GiB",
    "null",
    "true",
    "[1, 2]",
    "[" * 3000,
    "{a: 1}",
    "!!int x",
    "a\nb",
    "\x1b[31m",
    "\udcff",
    "\ud800",
    "é",
    "漢字",
    "x" * 300,
    "x" * 100_000,
    "a/" * 3000,
    "/",
    ".",
    "..",
    "~",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "/etc",
    "a,b",
    "*",
    "%s",
    "{}",
    "owner/name",
    "model.gguf",
)


def _command_lines(material: Material, scratch: Path) -> dict[str, list[list[str]]]:
    """Return a good command line of each command, as groups of words that belong together."""
    folder = material.folder
    model, sharded, text = folder / "model", folder / "sharded", folder / "text.txt"
    out = scratch / "out"
    lines: dict[str, list[list]] = {
        "inspect": [[sharded], ["--tensors"], ["--json"], ["--base", model]],
        "convert import": [
            [model],
            [out],
            ["--file-size", "1MB"],
            ["--base", model],
            ["--dry-run"],
        ],
        "convert export": [[sharded], [out], ["--file-size", "1MB"], ["--format", "hf"]],
        "verify": [
            *[[model], [sharded], ["--base", model], ["--logits", text], ["--tokens", "16"]],
            *[["--tolerance", "1e-5"], ["--lines", "3"], ["--logits-only"]],
        ],
        "prepare": [
            *[[text], ["--model", model], ["--output", out], ["--bos", "auto"], ["--eos", "yes"]],
            *[["--end-token", "</s>"], ["--text-key", "text"]],
        ],
        "evaluate": [
            *[[model], ["--output", out], ["--text", text], ["--max-tokens", "64"]],
            *[["--lengths", "16", "32"], ["--tasks", "passkey"], ["--task-lengths", "64"]],
            *[["--depths", "0", "1"], ["--samples", "1"], ["--seed", "0"], ["--bos", "auto"]],
            *[["--tp", "1"], ["--cp", "1"], ["--dtype", "float32"], ["--device", "cpu"]],
            *[["--teacher", model], ["--filler", "sentences"], ["--tokenizer", model]],
        ],
        "plan": [
            *[["--model", model], ["--gpus", "2 x H100 80GB"], ["--nodes", "2"], ["--json"]],
            *[["--gpu-memory", "80"], ["--gpu-tflops", "900"], ["--network", "40"]],
            *[["--optimizer.steps", "3"], ["--data.context_length", "32"]],
        ],
        "preflight": [[word] for word in material.command(out)[1:]],
        "train": [[word] for word in (*material.command(out)[1:], "--optimizer.steps=1")],
        "report": [[folder / "run"]],
        "push": [
            *[[folder / "run"], ["--repo", "a/b"], ["--base-model", "c/d"], ["--card-only"]],
            *[["--license", "mit"], ["--public"], ["--update"]],
        ],
    }
    return {
        name: [[str(word) for word in group] for group in groups] for name, groups in lines.items()
    }


def _tools(material: Material, scratch: Path) -> dict[str, list[list[str]]]:
    run = str(material.folder / "run")
    return {
        "compare_runs": [[run], [run]],
        "convert_gguf": [[str(material.folder / "text.txt")], [str(scratch / "out")]],
        "inspect_checkpoint": [[str(material.folder / "sharded")]],
        "code_map": [["--help"]],
    }


def _script(material: Material, scratch: Path) -> list[list[str]]:
    folder = material.folder
    # Three processes do not fit into two: the script stops before anything is started.
    return [
        *[["--model", str(folder / "model")], ["--data", str(folder / "text.txt")]],
        *[["--output", str(scratch / "out")], ["--gpus", "3"], ["--tp", "2"], ["--cp", "1"]],
        *[["--max-restarts", "0"], ["--id", "x"], ["--config", "quickstart"], ["--preflight"]],
    ]


def disturbed(rng: random.Random, groups: list[list[str]]) -> list[str]:
    """Return the words of a command line, some of which are odd."""
    groups = [list(group) for group in groups]
    for _ in range(rng.choice([1, 1, 2, 3])):
        group = rng.choice(groups)
        value, choice = rng.choice(VALUES), rng.random()
        if choice < 0.5:
            group[-1] = value if "=" not in group[-1] else group[-1].partition("=")[0] + "=" + value
        elif choice < 0.6:
            group[:] = [f"{group[0]}={value}"]
        elif choice < 0.7:
            group.clear()
            group.append(value)
        elif choice < 0.8:
            group.extend([value, rng.choice(VALUES)])
        elif choice < 0.9:
            groups.append([rng.choice(["--x", "-x", "--help", "--version", group[0]]), value])
        else:
            groups.remove(group)
            groups = groups or [[value]]
    if rng.random() < 0.1:
        rng.shuffle(groups)
    return [word for group in groups for word in group]


def try_case(seed: int, material: Material, scratch: Path) -> tuple[str, Trial]:
    """Draw a command line and run it; return it and how it ended."""
    rng = random.Random(seed)
    way = rng.random()
    if way < 0.03:
        words = disturbed(rng, _script(material, scratch))
        return f"train.sh {words!r}"[:400], _run_script(words)
    if way < 0.1:
        name, groups = rng.choice(sorted(_tools(material, scratch).items()))
        words = disturbed(rng, groups)
        return f"tools.{name} {words!r}"[:400], try_call(_tool(name, words))
    if way < 0.25:
        return _try_configuration(rng, material, scratch)
    name, groups = rng.choice(sorted(_command_lines(material, scratch).items()))
    words = [*name.split(), *disturbed(rng, groups)]
    if rng.random() < 0.03:
        words[0] = rng.choice(VALUES)
    return f"megalard {words!r}"[:400], try_command(words)


def _try_configuration(rng: random.Random, material: Material, scratch: Path) -> tuple[str, Trial]:
    """Give a drawn configuration to the commands that look at all of its settings."""
    path = scratch / "config.yaml"
    tree = draw_tree(rng)
    path.write_text(write_yaml(rng, tree), encoding="utf-8", errors="surrogatepass")
    given = material.command(scratch / "out")[1:]
    name = rng.choice(["plan", "plan", "preflight"])
    if name == "plan":
        model = ["--model", str(material.folder / "model")]
        words = ["plan", *model, "--gpus", rng.choice(["1", "8", "3", "64"]) + " x H100 80GB"]
        words += ["--config", str(path)]
        words += [] if rng.random() < 0.3 else ["--data.context_length", rng.choice(["32", "64"])]
    else:
        # What is not given is left to the drawn configuration; paths are always those of the case.
        kept = [word for word in given if word.startswith(("--model", "--data.paths", "--run."))]
        others = [word for word in given if word not in kept and rng.random() < 0.6]
        words = ["preflight", "--config", str(path), *kept, *others]
    case = f"{name} {path.read_bytes()!r}"[:800]
    return case, try_command(words)


def _tool(name: str, words: list[str]) -> Callable[[], int]:
    import importlib

    module = importlib.import_module(f"tools.{name}")
    return lambda: module.main(words)


def _run_script(words: list[str]) -> Trial:
    environment = {**os.environ, "PYTHON": sys.executable}
    try:
        done = subprocess.run(
            [b"bash", os.fsencode(_TRAIN), *(word.encode(errors="replace") for word in words)],
            capture_output=True,
            env=environment,
            timeout=120,
        )
    except OSError as error:  # longer than the system takes
        return Trial("refused", 1, str(error), "")
    out, err = (part.decode(errors="replace") for part in (done.stdout, done.stderr))
    lines = [line for line in err.splitlines() if ": error: " in line]
    if done.returncode and len(lines) == 1:
        return Trial("refused", done.returncode, lines[0], out + err)
    return judge(done.returncode, out, err)


def _prepare_material(folder: Path, options: argparse.Namespace) -> Material:
    return make_material(folder)


def _outcomes(
    seed: int, material: Material, scratch: Path, options: argparse.Namespace
) -> Iterator[Outcome]:
    case, trial = try_case(seed, material, scratch)
    yield Outcome(trial.kind, trial.is_good, case, trial.detail)


CAMPAIGN = Campaign(__doc__, 3000, _outcomes, _prepare_material)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; return the exit status."""
    return CAMPAIGN.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
