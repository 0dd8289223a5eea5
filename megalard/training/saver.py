"""Save the state of a run at intervals, in the background, and remove old checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from megalard.checkpoint.companions import Companion
from megalard.checkpoint.sharded.save_load import save_sharded
from megalard.checkpoint.write_options import WriteOptions
from megalard.config.schema import CheckpointConfig
from megalard.parallel.mesh import Axis
from megalard.reporter import Reporter
from megalard.training import state
from megalard.training.origins import Origins
from megalard.training.run_folder import checkpoint_path, checkpoints, discard
from megalard.training.step import Distiller


class Saver:
    """Writes the checkpoints of a run. Every call is a collective call of all ranks.

    Use it in a ``with`` statement, whose end waits for a save in progress.

    Args:
        folder: the directory of the checkpoints.
        steps: the number of steps of the run. A checkpoint is saved after the last one.
        origins: the models of the run. Their files are noted with checksums, computed once.
        companions: files that are copied next to the shards.
        settings: how often to save, and how many checkpoints to keep.
        axis: all ranks, with a process group for CPU tensors that nothing else uses.
        origin_sections: the sections ``base`` and ``teacher``, if the files have been compared
            already.
        resumed_step: the step of the checkpoint that the run resumed from; 0 for a new run.

    Attributes:
        best_step: the step whose checkpoint is never removed; None without one.
    """

    distiller: Distiller
    sections: Callable[[int], dict]
    best_step: int | None = None

    def __init__(
        self,
        folder: Path,
        steps: int,
        origins: Origins,
        companions: tuple[Companion, ...],
        settings: CheckpointConfig,
        axis: Axis,
        origin_sections: dict | None = None,
        resumed_step: int = 0,
    ):
        self.folder, self.steps, self.origins = folder, steps, origins
        self.options = WriteOptions(companions)
        self.settings, self.axis = settings, axis
        self._origin_sections = origin_sections
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future | None = None
        self._staging: dict[str, torch.Tensor] = {}
        self._saved_step = resumed_step

    def begin_stage(self, distiller: Distiller, sections: Callable[[int], dict]) -> None:
        """Save the state of another stage from now on.

        Args:
            distiller: the state to save.
            sections: returns the sections of the manifest after some step, except ``base`` and
                ``teacher``.
        """
        self.wait()
        self.distiller, self.sections = distiller, sections
        self._staging = {}

    def end_stage(self) -> None:
        """Let go of the state of the present stage, after the save in progress."""
        self.wait()
        del self.distiller
        self._staging = {}

    def is_due(self, step: int) -> bool:
        """Whether the configuration asks for a checkpoint after this step."""
        every = self.settings.save_every
        return every > 0 and (step % every == 0 or step == self.steps)

    def save(self, step: int) -> None:
        """Save the state after ``step`` steps, in the background if configured.

        Raises:
            UserError: on every rank, if this save, or the save still in progress, fails.
        """
        self.wait()
        if self._saved_step == step:
            return
        self._saved_step = step
        tensors = state.training_state(self.distiller)
        sections = self.sections(step)
        if not self.settings.asynchronous:
            self._write(step, tensors, sections)
            return
        staged = self._stage(tensors)
        self._running = self._thread.submit(self._write, step, staged, sections)

    def is_writing(self) -> bool:
        """Whether a save in the background is still in progress on this rank."""
        return self._running is not None and not self._running.done()

    def has_failed(self) -> bool:
        """Whether the save in the background has failed on this rank; ``wait`` raises the error."""
        is_done = self._running is not None and self._running.done()
        return is_done and self._running.exception() is not None

    def wait(self) -> None:
        """Wait until the save in progress is on the disk.

        Raises:
            UserError: on every rank, if it failed.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _stage(self, tensors: state.State) -> state.State:
        """Copy tensors to host memory, pinned if there is a GPU, which the next save reuses."""
        is_pinned = self.distiller.mesh.device.type == "cuda"
        staged: state.State = {}
        for name, part in tensors.items():
            if name not in self._staging:
                self._staging[name] = torch.empty(
                    part.value.shape, dtype=part.value.dtype, device="cpu", pin_memory=is_pinned
                )
            self._staging[name].copy_(part.value, non_blocking=is_pinned)
            staged[name] = replace(part, value=self._staging[name])
        if is_pinned:
            torch.cuda.current_stream().synchronize()
        return staged

    def _write(self, step: int, tensors: state.State, sections: dict) -> None:
        if self._origin_sections is None:
            self._origin_sections = self.origins.describe(self.axis)
        save_sharded(
            checkpoint_path(self.folder, step),
            {name: part.as_tensor(self.distiller.mesh) for name, part in tensors.items()},
            {**sections, **self._origin_sections},
            self.axis,
            self.options,
        )
        if self.axis.rank == 0:
            self._prune()

    def _prune(self) -> None:
        """Remove checkpoints that are neither among the newest, nor at a multiple, nor the best."""
        every = self.settings.keep_every
        for step, path in checkpoints(self.folder)[: -self.settings.keep_last]:
            if step == self.best_step or (every and step % every == 0):
                continue
            try:
                discard(path)
            except OSError as error:
                Reporter(True).warning(f"cannot remove the old checkpoint {path}: {error.strerror}")

    def __enter__(self) -> Saver:
        # A process that was killed right after a save has not removed the checkpoints before it.
        if self.axis.rank == 0:
            self._prune()
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except Exception:
            # Do not mask the exception that is ending the run.
            if kind is None:
                raise
        finally:
            self._thread.shutdown()
