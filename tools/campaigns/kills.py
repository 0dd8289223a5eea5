"""Kill training, saving, exporting and importing at random moments; the same command goes on.

  python -m tools.campaigns.kills --count 300 --seed 0
  python -m tools.campaigns.kills --count 10 --way script

A case is one piece of work: a run with checkpoints and exports after every other step, an import or
an export. It is started and killed with SIGKILL again and again, after random times, until it comes
to its end. No start may be refused, the result must have the bits of a run that nobody killed, and
nothing may be left behind. The way ``fork`` kills forked processes; ``script`` runs
launch/train.sh with two ranks and kills a rank, the launcher or the script.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megalard import cli
from tools.campaigns.campaign import Campaign
from tools.campaigns.damage import same_weights
from tools.campaigns.material import STEPS, Material, make_material
from tools.campaigns.tally import Outcome

_TRAIN = Path(__file__).parents[2] / "launch" / "train.sh"
_LIMIT_S = 120
_KILLS_PER_CASE, _KILLS_PER_SCRIPT = 12, 4

# Exports come before the first checkpoint, with a checkpoint, and between two.
_SAVING = (
    "checkpoint.export_every=2",
    "checkpoint.save_every={every}",
    "checkpoint.keep_last=2",
    "checkpoint.asynchronous={asynchronous}",
)


def _run_quietly(words: list[str], log: str) -> None:
    """Run a command in a forked process, with its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os._exit(cli.main(words))


def killed_until_done(
    rng: random.Random, start: Callable[[], multiprocessing.Process], longest_s: float
) -> tuple[int, int | None]:
    """Start a process and kill it after random times until it ends by itself.

    Returns:
        The number of kills, and the last exit status; None if the process did not end.
    """
    kills = 0
    while True:
        process = start()
        process.start()
        patience = rng.random() * longest_s if kills < _KILLS_PER_CASE else _LIMIT_S
        process.join(patience)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            if patience == _LIMIT_S:
                return kills, None
            kills += 1
            continue
        if process.exitcode:
            return kills, process.exitcode
        return kills, 0


def _leftovers(folder: Path) -> list[str]:
    marks = (".partial", ".removed", ".old-", ".done-", ".unfinished")
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if any(mark in path.name for mark in marks)
    )


def _try_train(rng: random.Random, material: Material, scratch: Path) -> tuple[str, int, str]:
    output, log = scratch / "output", scratch / "log"
    choices = {"every": rng.choice([1, 2, 3, 30]), "asynchronous": rng.choice(["true", "false"])}
    options = [option.format(**choices) for option in _SAVING]
    words = [str(word) for word in material.command(output, *options)]
    fork = multiprocessing.get_context("fork")

    def start() -> multiprocessing.Process:
        return fork.Process(target=_run_quietly, args=(words, str(log)))

    kills, status = killed_until_done(rng, start, 2.5)
    problem = _problem_of(status, log)
    if not problem:
        problem = _problem_of_run(output, material.folder / "run", choices["every"])
    return f"train {choices}, {kills} kills", kills, problem


def _problem_of(status: int | None, log: Path) -> str:
    printed = log.read_text(errors="replace")
    if status is None:
        return f"it did not end in {_LIMIT_S} s: {printed[-300:]}"
    if status:
        return f"status {status}: {printed[-500:]}"
    if "Traceback" in printed:
        return f"a traceback: {printed[-500:]}"
    return ""


def _problem_of_run(output: Path, reference: Path, every: int) -> str:
    if not same_weights(output / "student", reference / "student"):
        return "other bits"
    if _leftovers(output):
        return f"left behind: {_leftovers(output)}"
    saved = sorted(path.name for path in (output / "checkpoints").iterdir())
    expected = [step for step in range(1, STEPS + 1) if step % every == 0 or step == STEPS][-2:]
    if saved != [f"step-{step:06d}" for step in expected]:
        return f"checkpoints are {saved}"
    exports = sorted(path.name for path in output.glob("step-*"))
    if exports != [f"step-{step:06d}" for step in range(2, STEPS, 2)]:
        return f"exports are {exports}"
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return "" if len(lines) == STEPS else f"metrics.jsonl has {len(lines)} lines"


def _try_convert(rng: random.Random, material: Material, scratch: Path) -> tuple[str, int, str]:
    direction = rng.choice(["import", "export"])
    source = material.folder / ("model" if direction == "import" else "sharded")
    target, log = scratch / "target", scratch / "log"
    words = ["convert", direction, str(source), str(target), "--file-size", "20KB"]
    fork = multiprocessing.get_context("fork")

    def start() -> multiprocessing.Process:
        return fork.Process(target=_run_quietly, args=(words, str(log)))

    # A kill after the target has its name leaves the target complete; it is not written again.
    kills = 0
    while not target.exists():
        process = start()
        process.start()
        process.join(rng.random() * 0.4 if kills < _KILLS_PER_CASE else _LIMIT_S)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            return f"{direction}, {kills} kills", kills, _problem_of(process.exitcode, log)
    compare = ["verify", str(target), str(material.folder / "model")]
    check = fork.Process(target=_run_quietly, args=(compare, str(log)))
    check.start()
    check.join()
    problem = _problem_of(check.exitcode, log)
    if not problem and _leftovers(scratch):
        problem = f"left behind: {_leftovers(scratch)}"
    return f"{direction}, {kills} kills", kills, problem


def _try_script(rng: random.Random, material: Material, scratch: Path) -> tuple[str, int, str]:
    """Run launch/train.sh with two ranks; kill one of its processes until it comes to its end."""
    output, log = scratch / "output", scratch / "log"
    reference = material.folder / "run-script"
    kills = 0
    while True:
        script = _start_script(material, output, log)
        patience = 4 + rng.random() * 16 if kills < _KILLS_PER_SCRIPT else _LIMIT_S
        try:
            status = script.wait(patience)
        except subprocess.TimeoutExpired:
            processes = _family(script.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(processes), signal.SIGKILL)
            kills += 1
            script.wait(_LIMIT_S)
            if not _all_ended(processes):
                return "script", kills, f"processes live on {_LIMIT_S} s after a kill"
            continue
        problem = f"status {status}: {log.read_text()[-500:]}" if status else ""
        problem = problem or _problem_of_run(output, reference, 2)
        return f"script, {kills} kills", kills, problem


def _start_script(material: Material, output: Path, log: Path) -> subprocess.Popen:
    options = [option.format(every=2, asynchronous="true") for option in _SAVING]
    words = material.command(output, *options, "parallel.tp=2")[1:]
    given = ("--model.teacher=", "--data.paths=", "--run.output=")
    paths = ["--model", material.folder / "model", "--data", material.folder / "text.txt"]
    command = ["bash", _TRAIN, *paths, "--output", output, "--gpus", "2", "--"]
    command += [word for word in words if not word.startswith(given)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(
            [str(word) for word in command], stdout=file, stderr=file, env=environment
        )


def _family(pid: int) -> list[int]:
    """Return a process and all that it started."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(c) for t in threads for c in (t / "children").read_text().split()]
    except OSError:
        children = []
    return [pid] + [member for child in children for member in _family(child)]


def _all_ended(processes: list[int]) -> bool:
    deadline = time.monotonic() + _LIMIT_S
    while any(_is_running(pid) for pid in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def _prepare_material(folder: Path, options: argparse.Namespace) -> Material:
    material = make_material(folder)
    if options.way == "script":
        log = folder / "log"
        status = _start_script(material, folder / "run-script", log).wait(_LIMIT_S)
        assert status == 0, log.read_text()
    return material


def _outcomes(
    seed: int, material: Material, scratch: Path, options: argparse.Namespace
) -> Iterator[Outcome]:
    rng = random.Random(seed)
    ways = (_try_train, _try_train, _try_convert)
    way = _try_script if options.way == "script" else rng.choice(ways)
    case, kills, problem = way(rng, material, scratch)
    kind = "bad" if problem else case.split()[0].rstrip(",")
    yield Outcome(kind, not problem, case, problem, events={"kills": kills})


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--way", choices=("fork", "script"), default="fork", help="(fork)")


CAMPAIGN = Campaign(__doc__, 300, _outcomes, _prepare_material, add_arguments=_add_arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; return the exit status."""
    return CAMPAIGN.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
