"""Change the package in one place at a time, and see whether the tests fail.

  python -m pip install -e '.[mutation]'
  python -m tools.mutation.run --count 300 --seed 0 --output mutants.jsonl
  python -m tools.mutation.run --count 20 --changed main --output mutants.jsonl

Each mutant is one change, such as + for - or an argument that is not handed over, drawn with the
seed from all places of the package. In a copy of the checkout the tests of the file are run first,
then those of its folder, then whole runs (settings and parity). A mutant that none of them catches
has survived: read it, and add a test, or a reason why it changes nothing. docs/testing.md has a
sample. Results are appended, and a mutant that has one is not repeated. The status is 1 if any
mutant survived.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megalard import cli
from megalard.errors import UserError
from tools import command_line
from tools.mutation.places import Mutant, mutated, sample

ROOT = Path(__file__).resolve().parents[2]
# These need a GPU, or an interpreter that takes minutes for a test.
_LEFT_OUT = ("kernels/relation_kl/triton/", "kernels/relation_kl/hopper/")
_WHOLE_RUNS = ("tests/settings", "tests/parity/test_parity.py")
# Folders next to the tests that are installed once and only read.
_INSTALLED = (".transformers-4.57", ".lm-eval")


def main(arguments: list[str] | None = None) -> int:
    """Run a sample of mutants; return the exit status."""
    parser = command_line.make_parser("tools.mutation.run", __doc__)
    parser.add_argument(
        "--count", type=command_line.at_least(1), default=300, metavar="N", help="mutants to draw"
    )
    parser.add_argument(
        "--seed", type=command_line.at_least(0), default=0, metavar="N", help="another sample"
    )
    parser.add_argument("--changed", metavar="REV", help="only files that differ from a revision")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="results, a JSON object a line"
    )
    parser.add_argument(
        "--python", default=sys.executable, metavar="FILE", help="the Python that runs the tests"
    )
    parser.add_argument(
        "--limit-s",
        type=command_line.above(0, float),
        default=600.0,
        metavar="S",
        help="seconds for one run of tests; a mutant that takes longer is caught",
    )
    options = parser.parse_args(arguments)
    return cli.run(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Try the mutants of a sample, and print how many survive."""
    # An end by SIGTERM takes the change back and ends the tests, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    mutants = sample(ROOT, package_files(options.changed), options.count, options.seed)
    results = read_results(options.output)
    with tempfile.TemporaryDirectory(prefix="megalard-mutants-") as name:
        copy = copy_checkout(Path(name) / "checkout")
        for number, mutant in enumerate(mutants, 1):
            if mutant.key in results:
                continue
            result = try_mutant(mutant, copy, options.python, options.limit_s)
            results[mutant.key] = result
            with open(options.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            outcome = result["caught_by"] or "SURVIVED"
            print(f"{number}/{len(mutants)} {mutant.path}:{mutant.place[0]} {outcome}", flush=True)
    tried = [results[mutant.key] for mutant in mutants]
    survivors = [result for result in tried if not result["caught_by"]]
    for result in survivors:
        print(f"\n{result['diff']}", end="")
    print(f"{len(survivors)} of {len(tried)} mutants survived")
    return 1 if survivors else 0


def package_files(revision: str | None = None) -> list[str]:
    """Return the files of the package that are mutated, sorted.

    Args:
        revision: keep only the files that differ from it.
    """
    words = ["ls-files"] if revision is None else ["diff", "--name-only", revision]
    files = _git(*words, "--", "megalard/*.py", "kernels/*.py")
    return sorted(
        file for file in files if not file.startswith(_LEFT_OUT) and (ROOT / file).is_file()
    )


def _git(*words: str) -> list[str]:
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout.split("\n")[:-1]


def tests_of(path: str) -> list[list[str]]:
    """Return the tests for a file, in the order in which they are run.

    These are the test file of the same name, the other tests of its folder, and whole runs.
    """
    folder, name = Path(path).parent, Path(path).stem
    parts = [part for part in folder.parts if part not in ("megalard", "relation_kl")]
    mirror = Path("tests", *parts)
    groups = []
    if (ROOT / mirror / f"test_{name}.py").is_file():
        groups.append([str(mirror / f"test_{name}.py")])
    if mirror != Path("tests"):
        groups.append([str(mirror)])
    return [*groups, list(_WHOLE_RUNS)]


def copy_checkout(target: Path) -> Path:
    """Copy the files that git knows; return the directory."""
    for file in _git("ls-files"):
        source, copy = ROOT / file, target / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(os.readlink(source))
        elif source.is_file():
            shutil.copy2(source, copy)
    for name in _INSTALLED:
        if (ROOT / "tests" / name).is_dir():
            (target / "tests" / name).symlink_to(ROOT / "tests" / name)
    return target


def try_mutant(mutant: Mutant, copy: Path, python: str, limit_s: float) -> dict:
    """Apply a mutant to the copy, run the tests, and take the mutant back; return the result."""
    file, start = copy / mutant.path, time.monotonic()
    before = file.read_text(encoding="utf-8")
    after = mutated(mutant, before)
    lines = difflib.unified_diff(
        before.splitlines(True), after.splitlines(True), mutant.path, mutant.path, n=1
    )
    caught_by = ""
    file.write_text(after, encoding="utf-8")
    try:
        for group in tests_of(mutant.path):
            caught_by = _failure(group, copy, python, limit_s)
            if caught_by:
                break
    finally:
        file.write_text(before, encoding="utf-8")
    seconds = round(time.monotonic() - start, 1)
    return {
        "key": mutant.key,
        "line": mutant.place[0],
        "operator": mutant.operator,
        "caught_by": caught_by,
        "seconds": seconds,
        "diff": "".join(lines),
    }


def _failure(tests: Sequence[str], copy: Path, python: str, limit_s: float) -> str:
    """Run tests up to the first that fails; return its name, or nothing if all pass."""
    words = ["-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *tests]
    settings = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [python, *words],
        cwd=copy,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"time ({limit_s:g} s)"
    finally:
        # What the tests started is in the same group, unless it has left it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode in (0, 5):  # 5: no test was collected
        return ""
    failed = [line.split()[1] for line in printed.splitlines() if line[:6] in ("FAILED", "ERROR ")]
    return failed[0] if failed else f"exit status {process.returncode}"


def read_results(path: Path) -> dict[str, dict]:
    """Return the results of earlier starts by key."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {result["key"]: result for result in map(json.loads, lines)}


if __name__ == "__main__":
    sys.exit(main())
