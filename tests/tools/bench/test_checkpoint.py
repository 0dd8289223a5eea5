"""The benchmark of checkpoints, at a tiny size."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalard import cli
from tests.command_line import one_error, tool, user_error
from tests.ranks import run_ranks
from tools.bench import checkpoint_files, checkpoint_worker
from tools.bench.checkpoint_files import Work, run_process

checkpoint = tool("bench.checkpoint")


@pytest.fixture
def in_this_process(monkeypatch):
    """Do the work of every process in this one, where torch has been imported."""

    def run(command: list[str]) -> Work:
        start, printed = time.perf_counter(), io.StringIO()
        if command[0] == "cp":
            subprocess.run(command, check=True)
        else:
            python, flag, module, *words = command
            main = {"megalard": cli.main, "tools.bench.checkpoint_worker": checkpoint_worker.main}
            assert (python, flag) == (sys.executable, "-m")
            with contextlib.redirect_stdout(printed):
                assert main[module](words) == 0, command
        return Work(time.perf_counter() - start, 2**30, printed.getvalue())

    def are_same(a: Path, b: Path) -> bool:
        with contextlib.redirect_stdout(io.StringIO()):
            return cli.main(["verify", str(a), str(b)]) == 0

    monkeypatch.setattr(checkpoint_files, "run_process", run)
    monkeypatch.setattr(checkpoint_files, "are_same", are_same)
    monkeypatch.setattr(checkpoint_files, "drop_caches", lambda: False)


def test_everything_is_measured_against_cp(in_this_process, tmp_path, capsys):
    scratch, file = tmp_path / "scratch", tmp_path / "checkpoint.json"
    assert checkpoint("--shape", "tiny", "--scratch", scratch, "--json", file) == 0
    report = json.loads(file.read_text())
    results = {result["work"]: result for result in report["results"]}
    assert list(results) == [
        "cp", "cp, then sync", "convert import", "convert export", "save", "load"
    ]  # fmt: skip
    assert report["export_is_same"] and not report["caches_dropped"]
    # Two of these matrices, attention and MLP of four layers, nine norms; bf16.
    parameters = 2 * 1000 * 256 + 4 * (4 * 256 * 256 + 3 * 256 * 688) + 9 * 256
    assert report["bytes"] == pytest.approx(2 * parameters, rel=1e-3)
    for name, result in results.items():
        assert result["of_cp"] == pytest.approx(result["seconds"] / results["cp"]["seconds"])
        assert result["bytes_per_second"] == pytest.approx(report["bytes"] / result["seconds"])
        assert (result["peak_gib"] is None) == name.startswith("cp")
    # The state that is saved does not count as the memory of the save.
    assert results["convert import"]["peak_gib"] == 1.0
    assert results["save"]["peak_gib"] == pytest.approx(1.0 - report["bytes"] / 2**30)
    assert "bit for bit: yes" in capsys.readouterr().out
    assert list(scratch.iterdir()) == [], "everything is removed"


def test_a_process_is_measured():
    code = "x = bytearray(300_000_000); print('done', end='')"
    work = run_process([sys.executable, "-c", code])
    assert work.output == "done" and work.seconds > 0
    assert work.peak_bytes > 300_000_000


def test_the_benchmark_itself_is_small():
    """Its memory counts as that of the processes it starts; see ``getrusage``."""
    code = (
        "import resource, sys; from tools.bench import checkpoint, checkpoint_files;"
        "print('torch' in sys.modules, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    # Started from a small process, so that the memory of this one does not count.
    outer = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"]
    run = subprocess.run([*outer, sys.executable, "-c", code], capture_output=True, text=True)
    has_torch, peak_kib = run.stdout.split()
    assert has_torch == "False" and int(peak_kib) < 100_000, run.stdout


def test_a_process_that_fails_ends_the_benchmark():
    sentence = user_error(run_process, [sys.executable, "-c", "raise SystemExit(3)"])
    assert "ended with status 3" in sentence


def test_a_directory_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert checkpoint("--shape", "tiny", "--scratch", tmp_path / "file" / "scratch") == 1
    assert "cannot write --scratch" in one_error(capsys.readouterr().err)


def _stall(words: list[str]) -> None:
    assert checkpoint(*words) == 0


def test_both_kinds_of_saves_are_compared_with_steps_without_one(tmp_path):
    file, scratch = tmp_path / "stall.json", tmp_path / "scratch"
    words = ["--stall", "--shape", "tiny", "--tokens", "32", "--steps", "3", "--device", "cpu"]
    run_ranks(2, _stall, [*words, "--scratch", str(scratch), "--json", str(file)])
    report = json.loads(file.read_text())
    assert [result["save"] for result in report["results"]] == ["foreground", "background"]
    for result in report["results"]:
        assert result["steps_after"] >= 3 and result["held_seconds"] > 0
        cost = result["held_seconds"] + result["slowed_seconds"]
        assert result["share_of_step"] == pytest.approx(cost / (50 * report["step_seconds"]))
        # A save in the foreground is on the disk when it returns.
        is_written = result["written_after_seconds"] >= result["held_seconds"]
        assert is_written or result["save"] == "background"
    # fp32 weights and two moments: LoRA's A of q, k and v, and this rank's half of B.
    assert report["state_bytes_per_rank"] == 12 * 4 * 3 * (64 * 256 + 256 * 64 // 2)
    assert list(scratch.iterdir()) == []
