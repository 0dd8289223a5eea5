"""Change the package in one place at a time, and see whether the tests fail.

  python -m pip install -e '.[mutation]'
  python -m tools.mutation.run --count 300 --seed 0 --output mutants.jsonl
  python -m tools.mutation.run --count 300 --seed 0 --output mutants.jsonl --jobs 16
  python -m tools.mutation.run --count 20 --changed main --output mutants.jsonl

Each mutant is one change, such as + for - or an argument that is not handed over, drawn with the
seed from all places of the package. In a copy of the checkout the tests of the file are run first,
then those of its folder, then whole runs (settings and parity). A mutant that none of them catches
has survived: read it, and add a test, or a reason why it changes nothing. docs/testing.md has a
sample. A test that fails is run again without the change: if it fails there too, it catches
nothing, and the mutant has no result. Results are appended, and a mutant that has one is not
repeated. The status is 1 if any mutant survived or has no result.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

from megalard import cli
from megalard.errors import UserError
from tools import command_line
from tools.mutation.places import Mutant, mutated, sample

ROOT = Path(__file__).resolve().parents[2]
# These need a GPU, or an interpreter that takes minutes for a test.
_LEFT_OUT = ("kernels/relation_kl/triton/", "kernels/relation_kl/hopper/")
_WHOLE_RUNS = ("tests/settings", "tests/parity/test_parity.py")
# A line of pytest about a test that failed. The test's name may have spaces.
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
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
        "--jobs",
        type=command_line.at_least(1),
        default=1,
        metavar="N",
        help="mutants that are tried at the same time, each in a copy of the checkout",
    )
    parser.add_argument(
        "--deselect",
        nargs="+",
        default=[],
        metavar="TEST",
        help="tests that are not run, because they fail on this machine",
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
    left = [mutant for mutant in mutants if mutant.key not in results]
    unsettled: list[str] = []
    with tempfile.TemporaryDirectory(prefix="megalard-mutants-") as name:
        pytest = Pytest(options.python, options.limit_s, tuple(options.deselect))
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(min(options.jobs, len(left))):
            copies.put(copy_checkout(Path(name) / f"checkout-{number}"))

        def attempt(mutant: Mutant) -> dict:
            copy = copies.get()
            try:
                return try_mutant(mutant, copy, pytest)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(options.jobs) as pool:
            pending = {pool.submit(attempt, mutant): mutant for mutant in left}
            try:
                for number, future in enumerate(
                    as_completed(pending), len(mutants) - len(left) + 1
                ):
                    mutant = pending[future]
                    try:
                        result = future.result()
                    except UserError as error:
                        unsettled.append(str(error))
                        print(
                            f"{number}/{len(mutants)} {mutant.path} no result: {error}", flush=True
                        )
                        continue
                    results[mutant.key] = result
                    with open(options.output, "a", encoding="utf-8") as file:
                        file.write(json.dumps(result) + "\n")
                    outcome = result["caught_by"] or "SURVIVED"
                    place = f"{mutant.path}:{mutant.place[0]}"
                    print(f"{number}/{len(mutants)} {place} {outcome}", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                pytest.stop()
                raise
    tried = [results[mutant.key] for mutant in mutants if mutant.key in results]
    survivors = [result for result in tried if not result["caught_by"]]
    for result in survivors:
        print(f"\n{result['diff']}", end="")
    print(f"{len(survivors)} of {len(tried)} mutants survived")
    if unsettled:
        raise UserError(
            f"{len(unsettled)} mutants have no result, such as this one: {unsettled[0]}"
        )
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


def try_mutant(mutant: Mutant, copy: Path, pytest: Pytest) -> dict:
    """Apply a mutant to the copy, run the tests, and take the mutant back; return the result.

    Raises:
        UserError: the test that fails with the mutant fails without it too.
    """
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
            caught_by = pytest.failure(group, copy)
            if caught_by:
                break
    finally:
        file.write_text(before, encoding="utf-8")
    if "::" in caught_by and pytest.failure([caught_by], copy):
        raise UserError(
            f"{caught_by} fails without any change: mend it, or leave it out by --deselect"
        )
    seconds = round(time.monotonic() - start, 1)
    return {
        "key": mutant.key,
        "line": mutant.place[0],
        "operator": mutant.operator,
        "caught_by": caught_by,
        "seconds": seconds,
        "diff": "".join(lines),
    }


class Pytest:
    """Starts of pytest on copies of the checkout.

    Args:
        python: the interpreter.
        limit_s: seconds for one start.
        deselected: tests that are not run.
    """

    def __init__(self, python: str, limit_s: float, deselected: Sequence[str] = ()):
        self.python, self.limit_s, self.deselected = python, limit_s, deselected
        self._running: set[subprocess.Popen] = set()

    def failure(self, tests: Sequence[str], copy: Path) -> str:
        """Run tests up to the first that fails; return its name, or nothing if all pass."""
        words = ["-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *tests]
        words += [f"--deselect={test}" for test in self.deselected]
        settings = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [self.python, *words],
            cwd=copy,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._running.add(process)
        try:
            printed, _ = process.communicate(timeout=self.limit_s)
        except subprocess.TimeoutExpired:
            return f"time ({self.limit_s:g} s)"
        finally:
            self._running.discard(process)
            _kill_group(process)
            process.wait()
        if process.returncode in (0, 5):  # 5: no test was collected
            return ""
        names = _FAILED.findall(printed)
        return names[0] if names else f"exit status {process.returncode}"

    def stop(self) -> None:
        """End everything that runs."""
        for process in list(self._running):
            _kill_group(process)


def _kill_group(process: subprocess.Popen) -> None:
    # What the tests started is in the same group, unless it has left it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_results(path: Path) -> dict[str, dict]:
    """Return the results of earlier starts by key."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {result["key"]: result for result in map(json.loads, lines)}


if __name__ == "__main__":
    sys.exit(main())
