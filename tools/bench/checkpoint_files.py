"""Import, export, save and load of a model with random weights, next to cp.

This module does not import torch. The peak memory that Linux reports of a process is at least the
memory of the process that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megalard.errors import UserError
from tools.bench.results import Table, describe_environment, print_environment

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class Work:
    """The measurements of one process.

    Attributes:
        seconds: the time from its start to its end.
        peak_bytes: its largest resident size.
        output: the text that it printed.
    """

    seconds: float
    peak_bytes: int
    output: str


def measure(options: argparse.Namespace) -> tuple[dict, list[dict], dict]:
    """Measure all four and cp, and print a table.

    Returns:
        The environment, the results, and facts that concern all results.

    Raises:
        UserError: the directory cannot be written, or a process fails.
    """
    environment = describe_environment()
    print_environment(environment)
    with scratch_directory(options.scratch) as folder:
        are_cold = drop_caches()
        run_process(worker("make", options, folder / "huggingface"))
        size = sum(path.stat().st_size for path in (folder / "huggingface").iterdir())
        print(
            f"{options.shape}: {size / 1e9:.2f} GB of bf16, caches "
            f"{'dropped' if are_cold else 'not dropped'}\n"
        )
        report = Report(size)
        copy = run_process(["cp", "-r", str(folder / "huggingface"), str(folder / "copy")])
        start = time.perf_counter()
        os.sync()
        report.add_reference(copy.seconds, copy.seconds + time.perf_counter() - start)
        shutil.rmtree(folder / "copy")

        convert = [sys.executable, "-m", "megalard", "convert"]
        for command, source, target in (
            ("import", "huggingface", "sharded"),
            ("export", "sharded", "exported"),
        ):
            work = run_process([*convert, command, str(folder / source), str(folder / target)])
            report.add(f"convert {command}", work.seconds, work.peak_bytes)
        is_same = are_same(folder / "huggingface", folder / "exported")
        for name in ("sharded", "exported"):
            shutil.rmtree(folder / name)
        for command in ("save", "load"):
            work = run_process(worker(command, options, folder / "saved"))
            report.add(command, json.loads(work.output)["seconds"], work.peak_bytes - size)
    print("\nthe memory of save and load is given beyond the state")
    print(f"the exported model is the original, bit for bit: {'yes' if is_same else 'NO'}")
    facts = {"bytes": size, "caches_dropped": are_cold, "export_is_same": is_same}
    return environment, report.results, facts


def scratch_directory(parent: Path) -> tempfile.TemporaryDirectory:
    """Return a new directory inside ``parent``, as a context that removes it at its end.

    Raises:
        UserError: the directory cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return _Scratch(prefix="megalard-bench-", dir=parent)
    except OSError as error:
        raise UserError(f"cannot write --scratch {parent}: {error.strerror}") from None


class _Scratch(tempfile.TemporaryDirectory):
    def __enter__(self) -> Path:
        return Path(super().__enter__())


def worker(command: str, options: argparse.Namespace, directory: Path) -> list[str]:
    """Return the command line of a process of ``tools.bench.checkpoint_worker``."""
    module = [sys.executable, "-m", "tools.bench.checkpoint_worker"]
    return [*module, command, "--shape", options.shape, "--directory", str(directory)]


def run_process(command: list[str]) -> Work:
    """Run a command from cold caches.

    Raises:
        UserError: the process fails. It has printed the reason.
    """
    drop_caches()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(
            f"{' '.join(command)} ended with status {process.returncode}: follow the message above"
        )
    return Work(time.perf_counter() - start, usage.ru_maxrss * 1024, output)


def drop_caches() -> bool:
    """Write out and drop the cached parts of files; return whether the system allowed it."""
    os.sync()
    try:
        _DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def are_same(a: Path, b: Path) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    command = [sys.executable, "-m", "megalard", "verify", str(a), str(b)]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


class Report:
    """A table of the results, printed as they come.

    Attributes:
        results: the results as JSON takes them.

    Args:
        size: bytes of the model.
    """

    def __init__(self, size: int):
        self.results: list[dict] = []
        self._size, self._table = size, Table(
            ("work", 14), "seconds", "GB/s", "of cp", "of cp, synced", "peak memory, GiB"
        )  # fmt: skip

    def add_reference(self, seconds: float, synced_seconds: float) -> None:
        """Add cp, which all other work is compared with."""
        self._seconds, self._synced_seconds = seconds, synced_seconds
        self.add("cp", seconds, None)
        self.add("cp, then sync", synced_seconds, None)

    def add(self, name: str, seconds: float, peak_bytes: int | None) -> None:
        """Add and print one piece of work."""
        result = {
            "work": name,
            "seconds": seconds,
            "bytes_per_second": self._size / seconds,
            "of_cp": seconds / self._seconds,
            "of_cp_synced": seconds / self._synced_seconds,
            "peak_gib": None if peak_bytes is None else peak_bytes / 2**30,
        }
        self.results.append(result)
        self._table.row(
            name,
            f"{seconds:.1f}",
            f"{self._size / seconds / 1e9:.2f}",
            f"{result['of_cp']:.2f}",
            f"{result['of_cp_synced']:.2f}",
            "" if peak_bytes is None else f"{result['peak_gib']:.2f}",
        )
