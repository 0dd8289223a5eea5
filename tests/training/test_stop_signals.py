"""SIGTERM and SIGUSR1: save after the step, or end at once where there is nothing to save."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalard.parallel.mesh import build_mesh
from megalard.train import main
from megalard.training import preflight as preflight_module
from megalard.training import run as run_module
from megalard.training import stop_signals
from megalard.training.evaluator import Evaluator
from megalard.training.stop_signals import StopSignals
from tests.jobs import arguments, make_job, steps_reported, train
from tests.ranks import exit_codes, started_ranks, wait_until

ENDLESS = ("optimizer.steps=2000", "checkpoint.save_every=0")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job."""
    return make_job(tmp_path_factory.mktemp("signals"))


def test_a_signal_saves_and_ends_with_0(job, tmp_path):
    """One of two ranks gets it, or both do, and no checkpoint interval is configured."""
    output = tmp_path / "output"
    command = arguments(job, output, "parallel.tp=2", *ENDLESS)
    with started_ranks(2, main, command) as ranks:
        wait_until(lambda: len(steps_reported(output)) > 2)
        os.kill(ranks[1].pid, signal.SIGUSR1)
        assert exit_codes(ranks) == [0, 0]
    (saved,) = (output / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert steps_reported(output)[-1] == step and not (output / "student").exists()
    # The same command resumes there.
    with started_ranks(2, main, command) as ranks:
        wait_until(lambda: steps_reported(output)[-1] > step)
        for rank in ranks:
            os.kill(rank.pid, signal.SIGTERM)
        assert exit_codes(ranks) == [0, 0]
    steps = steps_reported(output)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step


def test_a_signal_during_the_export_ends_the_run_after_it(job, tmp_path, monkeypatch, capsys):
    output, save = tmp_path / "output", run_module.save_student

    def save_student(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args)

    monkeypatch.setattr(run_module, "save_student", save_student)
    evaluated = []
    monkeypatch.setattr(Evaluator, "after", lambda *args: evaluated.append(args))
    train(arguments(job, output))
    assert (output / "student" / "config.json").exists() and not evaluated
    assert "SIGTERM: the student is complete; run the same command to evaluate it" in (
        capsys.readouterr().out
    )
    # The same command resumes there, although no interval is configured.
    monkeypatch.setattr(run_module, "save_student", save)
    train(arguments(job, output))
    assert len(evaluated) == 1


def run_stuck(command: list[str], reached: Path) -> None:
    """Make each of two ranks wait for the other inside gloo, where Python calls no handler."""

    def wait(*args, **kwargs):
        rank = dist.get_rank()
        (reached / str(rank)).touch()
        dist.recv(torch.zeros(1), src=1 - rank)

    for module in (run_module, preflight_module):
        module.load_models = wait
    main(command)


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--preflight"], 143)], ids=str)
def test_a_signal_before_the_first_step_ends_the_run_at_once(options, status, job, tmp_path):
    """A preflight that was stopped has not passed."""
    command = [*options, *arguments(job, tmp_path / "output", "parallel.tp=2")]
    reached = tmp_path / "reached"
    reached.mkdir()
    with started_ranks(2, run_stuck, command, reached) as ranks:
        wait_until(lambda: len(list(reached.iterdir())) == 2)
        for rank in ranks:
            os.kill(rank.pid, signal.SIGTERM)
        assert exit_codes(ranks, 20) == [status, status]
    train(arguments(job, tmp_path / "output"))


@pytest.fixture
def handlers():
    """Restore the handlers of this process."""
    before = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_handlers_are_installed_and_restored(handlers):
    with StopSignals():
        for number in stop_signals.SIGNALS:
            assert signal.getsignal(number) != handlers[number]
    for number in stop_signals.SIGNALS:
        assert signal.getsignal(number) == handlers[number]


def test_a_signal_waits_for_the_end_of_the_step(handlers):
    mesh = build_mesh("cpu", 1)
    with StopSignals() as stop, stop.after_each_step(mesh):
        assert stop.agreed(mesh, False) == (None, False)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: stop._received)
        assert stop.agreed(mesh, False) == ("SIGUSR1", False)


def test_ranks_agree_on_a_failure(handlers):
    mesh = build_mesh("cpu", 1)
    with StopSignals() as stop, stop.after_each_step(mesh):
        assert stop.agreed(mesh, True) == (None, True)


@pytest.mark.parametrize("status", [0, 143])
def test_a_signal_with_nothing_to_save_exits(status, handlers, monkeypatch, capsys):
    monkeypatch.setattr(stop_signals, "_DELIVERY_S", 0.0)
    with pytest.raises(SystemExit) as caught, StopSignals(status):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: False, 5)
    assert caught.value.code == status
    assert capsys.readouterr().out == "SIGTERM: stopped; nothing to save\n"


def test_a_failure_is_not_hidden_by_a_later_signal(handlers):
    mesh = build_mesh("cpu", 1)
    with pytest.raises(ZeroDivisionError), StopSignals() as stop, stop.after_each_step(mesh):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: stop._received)
        raise ZeroDivisionError


def test_another_thread_installs_no_handlers(handlers):
    """Python lets only the main thread install them."""
    results = []

    def enter() -> None:
        with StopSignals():
            results.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert results == [handlers[signal.SIGTERM]]
