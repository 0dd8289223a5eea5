"""Saving a run's state every so often, in the background, keeping the newest and every M-th."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megalard.checkpoint.provenance import Origins
from megalard.checkpoint.sharded.save_load import save_sharded
from megalard.config.schema import CheckpointConfig
from megalard.parallel.mesh import Axis
from megalard.training import state
from megalard.training.run_folder import checkpoint_path, checkpoints, discard
from megalard.training.step import Distiller


class Saver:
    """Writes the checkpoints of a run; every call is a collective one of all ranks.

    Use it in a ``with`` statement, whose end waits for the save in progress.

    Args:
        folder: where the checkpoints go.
        distiller: whose state is saved.
        origins: the models' files, noted by their checksums once.
        head: the manifest's sections for a step, but ``base`` and ``teacher``.
        companions: files copied beside the shards.
        settings: how often, how many.
        axis: all ranks, with a CPU group that nothing else uses.
        known_origins: the note of the models' files, when they have been compared already.
    """

    def __init__(
        self,
        folder: Path,
        distiller: Distiller,
        origins: Origins,
        head: Callable[[int], dict],
        companions: Iterable[Path],
        settings: CheckpointConfig,
        axis: Axis,
        known_origins: dict | None = None,
    ):
        self.folder, self.distiller, self.origins, self.head = folder, distiller, origins, head
        self.companions, self.settings, self.axis = list(companions), settings, axis
        self._known_origins = known_origins
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future | None = None
        self._staging: dict[str, torch.Tensor] = {}
        self._saved: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether the configuration asks for a checkpoint after this step."""
        every = self.settings.save_every
        return every > 0 and (step % every == 0 or step == self.distiller.config.optimizer.steps)

    def save(self, step: int) -> None:
        """Save the state after ``step`` steps; in the background if configured.

        Raises:
            UserError: on every rank, when this save (or the one still in progress) fails.
        """
        self.wait()
        if self._saved == step:
            return
        self._saved = step
        tensors = state.training_state(self.distiller)
        head = self.head(step)
        if not self.settings.asynchronous:
            self._write(step, tensors, head)
            return
        staged = self._stage(tensors)
        self._running = self._thread.submit(self._write, step, staged, head)

    def is_writing(self) -> bool:
        """Whether a save in the background is still in progress on this rank."""
        return self._running is not None and not self._running.done()

    def failed(self) -> bool:
        """Whether the save in the background has failed on this rank; ``wait`` tells why."""
        done = self._running is not None and self._running.done()
        return done and self._running.exception() is not None

    def wait(self) -> None:
        """Until the save in progress is on the disk.

        Raises:
            UserError: on every rank, when it failed.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _stage(self, tensors: state.State) -> state.State:
        """Copies in host memory, pinned where there is a GPU and used again by the next save."""
        pinned = self.distiller.mesh.device.type == "cuda"
        staged: state.State = {}
        for name, (tensor, layout) in tensors.items():
            if name not in self._staging:
                self._staging[name] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned
                )
            self._staging[name].copy_(tensor, non_blocking=pinned)
            staged[name] = (self._staging[name], layout)
        if pinned:
            torch.cuda.current_stream().synchronize()
        return staged

    def _write(self, step: int, tensors: state.State, head: dict) -> None:
        if self._known_origins is None:
            self._known_origins = self.origins.describe(self.axis)
        save_sharded(
            checkpoint_path(self.folder, step),
            state.as_tensors(tensors, self.distiller),
            {**head, **self._known_origins},
            self.axis,
            companions=self.companions,
        )
        if self.axis.rank == 0:
            self._prune()

    def _prune(self) -> None:
        """Remove checkpoints that are neither among the newest nor a multiple to be kept."""
        every = self.settings.keep_every
        for step, path in checkpoints(self.folder)[: -self.settings.keep_last]:
            if every and step % every == 0:
                continue
            try:
                discard(path)
            except OSError as error:
                print(f"cannot remove the old checkpoint {path}: {error.strerror}", flush=True)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except Exception:
            # the error that ends the run is the one to be told
            if kind is None:
                raise
        finally:
            self._thread.shutdown()
