"""The training job from top to bottom, one call per line."""

from __future__ import annotations

import os
import sys
from contextlib import closing

import torch

from megalard.config.schema import Config
from megalard.parallel.mesh import build_mesh
from megalard.training.banner import report_end, report_finished, report_start
from megalard.training.estimated import check_fits
from megalard.training.evaluator import Evaluator
from megalard.training.output import find_output, open_output, scratch_folder
from megalard.training.plan import make_plan
from megalard.training.preflight import run_preflight
from megalard.training.run import Run
from megalard.training.stop_signals import StopSignals


def train(config: Config, stop: StopSignals) -> None:
    """Run the whole job. Every rank calls it; rank 0 writes and reports."""
    use_deterministic_kernels(config.run.deterministic)
    mesh = build_mesh(config.run.device, config.parallel.tp, config.parallel.cp)
    plan = make_plan(config, mesh)  # bad input fails here, before weights or text are read
    with open_output(config, mesh) as output:
        if output.is_finished:
            report_finished(output, mesh)
            return
        check_fits(config, plan.student, mesh)
        with closing(Run(config, plan, output, mesh)) as run:
            report_start(run)
            run.evaluate_before()
            run.resume()
            with stop.after_each_step(mesh), run.saver:
                run.export_if_due()
                for stage in run.stages_left():
                    run.begin(stage)
                    for number in stage.steps_after(run.steps_done):
                        run.step(stage, number)
                        run.validate(number)
                        if run.save_and_export(number, stop):
                            return
                        if run.stops_early():
                            break
                if run.export_student(stop):
                    return
            run.evaluate_after()
            run.summarize()
            run.finish()
            report_end(run)


def preflight(config: Config) -> None:
    """Check a run and take two steps of each of its stages; nothing stays on the disk."""
    use_deterministic_kernels(config.run.deterministic)
    mesh = build_mesh(config.run.device, config.parallel.tp, config.parallel.cp)
    plan = make_plan(config, mesh)
    find_output(config, mesh)
    with scratch_folder(mesh) as scratch:
        Evaluator(config, plan, scratch, mesh)
        run_preflight(config, plan, scratch, mesh)


def use_deterministic_kernels(deterministic: bool) -> None:
    """Allow only kernels that sum in one order, or allow all; called before the GPU is used."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Memory that is left uninitialized here is always written before it is read.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)


def main(arguments: list[str] | None = None) -> None:
    """Run ``megalard train`` with these arguments and exit with its status."""
    from megalard import cli

    sys.exit(cli.command("train")(arguments))


if __name__ == "__main__":
    main()
