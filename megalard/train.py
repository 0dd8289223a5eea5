"""Restore a RoPE-scaled model: ``torchrun ... -m megalard.train --config FILE``.

Read top to bottom, this is the job.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from contextlib import ExitStack, closing
from functools import partial

import torch
import torch.distributed as dist

from megalard.checkpoint.sharded.save_load import checkpoint_axis
from megalard.config.file import describe_keys, load_config
from megalard.config.schema import Config
from megalard.errors import RankError, UserError
from megalard.kernels.relation_kl import describe_kernels
from megalard.parallel.mesh import allowed_restarts, build_mesh
from megalard.training import assemble
from megalard.training.evaluator import Evaluator
from megalard.training.export import export_is_due, save_student
from megalard.training.monitor import Monitor
from megalard.training.preflight import preflight
from megalard.training.resume import describe_run, find_output, resume
from megalard.training.saver import Saver
from megalard.training.step import Distiller
from megalard.training.stop_signals import StopSignals

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

USAGE = """\
Restore a Llama-shaped model whose RoPE was scaled, by distilling the frozen native-RoPE teacher's
self-relations into the student (LinearARD, arXiv 2604.00004).

  python -m megalard.train --config FILE [--section.key value ...]
  torchrun --nproc-per-node 8 -m megalard.train --config FILE --parallel.tp 4

Every key of the configuration can be overridden on the command line.
"""


def choose_kernels(deterministic: bool) -> None:
    """Allow only kernels whose sums have one order, or any; before anything uses the GPU."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # what is left uninitialized here is written before it is read
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(deterministic)


def train(config: Config, stop: StopSignals) -> None:
    """Run the whole job. Every rank calls it; rank 0 writes and reports."""
    choose_kernels(config.run.deterministic)
    mesh = build_mesh(config.run.device, config.parallel.tp, config.parallel.cp)
    with ExitStack() as held:
        plan = assemble.make_plan(config, mesh)
        output = held.enter_context(assemble.prepare_output(config, mesh))
        with assemble.undone_on_error(output, mesh):
            tokens = assemble.open_streams(config, output.directory, plan, mesh)
            loaders = assemble.make_loaders(config, tokens, plan, mesh)
            evaluator = Evaluator(config, plan, output.directory, mesh)
            teacher, student, origins = assemble.load_models(config, plan, mesh)
        distiller = Distiller(teacher, student, config, mesh)
        evaluator.before(teacher, student.decoder)
        axis = checkpoint_axis(mesh)
        done, known = resume(output, distiller, origins, tokens, axis)
        steps, tokens_a_step = config.optimizer.steps, config.tokens_a_step
        first = mesh.world.rank == 0
        if first and mesh.device.type == "cuda":
            print(f"relation kernels: {describe_kernels(mesh.device)}", flush=True)
        if first and allowed_restarts() and not config.checkpoint.save_every:
            print(
                "warning: checkpoint.save_every is 0: a restart begins where this start began",
                flush=True,
            )
        monitor = Monitor(output.directory, steps, tokens_a_step, config.run.log_every, first, done)
        describe = partial(describe_run, distiller, plan.student_config, tokens, loaders)
        source = origins.base
        files = assemble.companions(plan, source)
        saver = Saver(
            output.checkpoints, distiller, origins, describe, files, config.checkpoint, axis, known
        )

        def export(name: str) -> None:
            save_student(output.directory / name, student, source, plan.student_config, files, mesh)

        with stop.after_a_step(mesh), loaders, closing(monitor), saver:
            for number in range(done + 1, steps + 1):
                batches = loaders.step(number - 1, mesh.device)
                result = distiller.step(batches, number - 1)
                monitor.step(number, result, mesh.device)
                asked, failed = stop.agreed(mesh, saver.failed())
                if failed:
                    saver.wait()
                if asked or saver.is_due(number):
                    saver.save(number)
                if asked:
                    saver.wait()
                    if first:
                        print(f"{asked}: saved after step {number} and stopped", flush=True)
                    return
                if export_is_due(config, number):
                    export(f"step-{number:06d}")
            export("student")
            asked, _ = stop.agreed(mesh, False)
            if asked:
                saver.save(steps)
        if asked:
            if first:
                print(
                    f"{asked}: the student is complete; the same command evaluates it", flush=True
                )
            return
        evaluator.after(teacher, student.decoder, tokens_a_step * steps)


def check(config: Config) -> None:
    """``--preflight``: everything a run does before it is paid for, without writing."""
    choose_kernels(config.run.deterministic)
    mesh = build_mesh(config.run.device, config.parallel.tp, config.parallel.cp)
    plan = assemble.make_plan(config, mesh)
    find_output(config, mesh)
    with assemble.scratch_folder(mesh) as scratch:
        Evaluator(config, plan, scratch, mesh)
        tokens = assemble.open_streams(config, scratch, plan, mesh, only_reuse=True)
        with assemble.make_loaders(config, tokens, plan, mesh) as loaders:
            teacher, student, _ = assemble.load_models(config, plan, mesh)
            preflight(Distiller(teacher, student, config, mesh), plan, loaders)


def main(arguments: list[str] | None = None) -> None:
    """Command line; prints a ``UserError`` in one line on rank 0 and exits with status 1."""
    parser = argparse.ArgumentParser(
        prog="megalard",
        description=USAGE,
        epilog="configuration keys:\n" + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the sections below")
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="load everything, run two real steps, check losses and gradients, report memory and "
        "time, and exit without writing",
    )
    options, overrides = parser.parse_known_args(arguments)
    # a preflight that was stopped has not passed
    with StopSignals(status=128 + signal.SIGTERM if options.preflight else 0) as stop:
        _run(options.config, overrides, None if options.preflight else stop)


def _run(config_file: str | None, overrides: list[str], stop: StopSignals | None) -> None:
    """``train``, or ``check`` without ``stop``; tells what a user can mend and exits with 1."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = load_config(config_file, overrides)
        train(config, stop) if stop else check(config)
    except UserError as error:
        if rank == 0 or isinstance(error, RankError):
            print(f"megalard: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(
            f"megalard: error: rank {rank} cannot read or write{where}: {error.strerror}; what was "
            "saved before is untouched",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        print(
            f"megalard: error: rank {rank} ran out of GPU memory ({str(error).splitlines()[0]}): "
            "raise parallel.tp, set parallel.activation_checkpointing true, or lower "
            "optimizer.micro_batch or data.context_length",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
