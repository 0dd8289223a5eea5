"""Trackers such as wandb: which values they receive, and that their failures never end a run."""

from __future__ import annotations

import json
import sys
import textwrap
import threading

import pytest

from megalard.reporter import Reporter
from megalard.training.trackers import BackgroundTracker, check_installed
from tests.command_line import refusal, user_error
from tests.jobs import STEPS, arguments, metrics, train

# A package that writes every call to calls.jsonl next to it.
STAND_IN = """
    import json
    from pathlib import Path

    {at_import}

    def note(*call):
        with open(Path(__file__).with_name("calls.jsonl"), "a") as file:
            file.write(json.dumps(call, default=str) + "\\n")

    class Settings(dict):
        pass

    class Run:
        def log(self, values, step=None):
            {on_log}
            note("log", step, values)

        def finish(self):
            note("finish")

    def init(**options):
        {on_init}
        note("init", options)
        return Run()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs a stand-in and returns one that reads its calls."""

    def install(name: str, at_import: str = "", on_init: str = "pass", on_log: str = "pass"):
        folder = tmp_path / f"package-{name}"
        folder.mkdir()
        lines = {"at_import": at_import, "on_init": on_init, "on_log": on_log}
        code = textwrap.dedent(STAND_IN).format(**lines)
        (folder / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        calls = folder / "calls.jsonl"

        def read() -> list[list]:
            lines = calls.read_text().splitlines() if calls.exists() else []
            return [json.loads(line) for line in lines]

        return read

    yield install
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def logged(calls: list[list]) -> dict[int, dict]:
    return {call[1]: call[2] for call in calls if call[0] == "log"}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_reported_values(name, package, small_job, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    calls = package(name)
    output = tmp_path / "my-run"
    train(arguments(small_job, output, f"run.trackers=[{name}]"))
    first, *_, last = calls()
    assert first[0] == "init" and last == ["finish"]
    assert first[1]["project"] == "megalard" and first[1]["resume"] == "allow"
    assert first[1]["name"].startswith("my-run")
    assert first[1]["config"]["optimizer"]["steps"] == STEPS
    expected = {line["step"]: line["loss"] for line in metrics(output)}
    assert {step: values["loss"] for step, values in logged(calls()).items()} == expected
    assert not (output / "tensorboard").exists()


def test_a_resumed_run_continues_the_tracked_run(package, small_job, tmp_path):
    calls, output = package("wandb"), tmp_path / "run"
    options = ("run.trackers=[wandb]", "checkpoint.save_every=4")
    train(arguments(small_job, output, *options))
    (output / "finished.json").unlink()
    train(arguments(small_job, output, *options))
    train(arguments(small_job, tmp_path / "other", *options))
    ids = [call[1]["id"] for call in calls() if call[0] == "init"]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    "failure",
    [
        {"on_init": "raise ConnectionError('no route to host')"},
        {"on_init": "raise SystemExit('no key')"},
        {"on_log": "raise ConnectionError('no route to host')"},
    ],
)
def test_a_tracker_that_fails_is_warned_about_once(failure, package, small_job, tmp_path, capsys):
    package("wandb", **failure)
    package("trackio")
    output = tmp_path / "run"
    train(arguments(small_job, output, "run.trackers=[wandb, trackio]"))
    printed = capsys.readouterr().out
    assert printed.count("warning: wandb failed and gets nothing more of this run (") == 1
    assert "warning: trackio" not in printed
    assert len(metrics(output)) == STEPS and (output / "finished.json").exists()


def test_a_package_that_cannot_be_imported_is_warned_about(package, small_job, tmp_path, capsys):
    package("wandb", at_import="raise RuntimeError('built for another Python')")
    train(arguments(small_job, tmp_path / "run", "run.trackers=[wandb]", "optimizer.steps=1"))
    assert "RuntimeError: built for another Python" in capsys.readouterr().out


def test_a_tracker_that_hangs_delays_the_end_for_a_limited_time(capsys):
    release = threading.Event()
    tracker = BackgroundTracker("wandb", release.wait, Reporter(True), close_s=0.05)
    tracker.add({"loss": 1.0}, 1)
    tracker.close()
    printed = capsys.readouterr().out
    assert printed.startswith("warning: wandb has not taken all values after 0.05 s")
    release.set()


def test_values_that_are_not_finite_are_left_out(package):
    given = []

    class Run:
        def log(self, values, step=None):
            given.append((dict(values), step))

        def finish(self):
            given.append("finish")

    tracker = BackgroundTracker("wandb", Run, Reporter(True))
    tracker.add({"loss": float("nan"), "rate": 1.0}, 3)
    tracker.close()
    assert given == [({"rate": 1.0}, 3), "finish"]


def test_a_package_that_is_missing_is_named(monkeypatch, small_job, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sentence = user_error(check_installed, ["tensorboard", "trackio"])
    assert sentence == (
        "run.trackers names trackio, which is not installed: install it with pip install trackio, "
        "or leave it out"
    )
    check_installed(["tensorboard"])


def test_a_run_says_at_its_start_what_is_missing(small_job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megalard.training.trackers.importlib.util.find_spec", lambda name: None)
    words = arguments(small_job, tmp_path / "run", "run.trackers=[wandb]")
    assert "run.trackers names wandb, which is not installed" in refusal(capsys, "train", *words)
    assert not (tmp_path / "run").exists()
