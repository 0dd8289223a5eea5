"""Saving the student as a Hugging Face directory that transformers 4.57 and 5 both read.

What was not trained is copied from the source files bit for bit; what was trained is gathered from
its slices, LoRA pairs are merged in fp32, and the result is rounded to the source file's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from megalard.checkpoint.huggingface_writer import FILE_BYTES, plan_files, write_huggingface
from megalard.checkpoint.weights import Weights, merge_lora, trained_parts
from megalard.config.schema import Config
from megalard.distill.student import Student
from megalard.errors import UserError
from megalard.parallel.collectives import all_gather_tokens
from megalard.parallel.mesh import Axis, Mesh
from megalard.parallel.tensor.layout import Layout

_SHARD_BYTES = FILE_BYTES
_GENERATION = "generation_config.json"


def save_student(
    directory: str | Path,
    student: Student,
    source: Weights,
    config: dict,
    companions: Iterable[Path],
    mesh: Mesh,
) -> None:
    """Write the merged student; a collective call of all ranks, in which rank 0 writes.

    The directory appears complete or not at all: files go to a sibling that is renamed at the end.
    One tensor at a time is gathered, so a rank's memory does not grow with the model.

    Args:
        directory: where to; replaced if it holds an earlier save.
        source: the files the student started from.
        config: the student's ``config.json``.
        companions: files copied beside the weights, such as the tokenizer's.

    Raises:
        UserError: on every rank, when rank 0 cannot write.
    """
    error = None
    if mesh.dp.rank == 0:
        merged = _MergedTensors(student, source, mesh.tp)
        if mesh.world.rank == 0:
            files = dict.fromkeys([*companions, source.directory / _GENERATION])
            try:
                write_huggingface(
                    directory, merged, config, files, file_bytes=_SHARD_BYTES, replace=True
                )
            except UserError as raised:
                error = str(raised)
                merged.drain()
        else:
            merged.drain()
    if mesh.world.size > 1:
        told = [error]
        dist.broadcast_object_list(told, src=0, group=mesh.world.group)
        error = told[0]
    if error is not None:
        raise UserError(error)


def export_is_due(config: Config, step: int) -> bool:
    """Whether the student is saved after this step; after the last it always is."""
    every = config.checkpoint.export_every
    return every > 0 and step % every == 0 and step < config.optimizer.steps


class _MergedTensors:
    """The student's tensors in the order of the files; each trained one is a collective.

    Ranks other than 0 follow with ``drain``, so that every rank joins every gather in one order.
    """

    def __init__(self, student: Student, source: Weights, axis: Axis):
        self.student, self.source, self.axis = student, source, axis
        self.directory = source.directory
        self.shape, self.dtype, self.files = source.shape, source.dtype, source.files
        self._pending = [name for file in plan_files(self, _SHARD_BYTES) for name in file]

    def names(self) -> list[str]:
        # a tied head that stands in the files is left out: beside a trained embedding it would
        # differ, and transformers 5 then unties them
        tied = self.student.decoder.spec.tied_embeddings
        return [n for n in self.source.names() if not (tied and n == "lm_head.weight")]

    def drain(self) -> None:
        """Take part in the gathers that are left."""
        for name in list(self._pending):
            if trained_parts(name, self.student.trained):
                self._gather(name)

    def read(self, name: str, layout: Layout | None = None) -> torch.Tensor:
        """The merged tensor in the source's dtype, on the CPU; a collective call if trained."""
        assert layout is None, "the student is exported whole"
        self._pending.remove(name)
        parts = trained_parts(name, self.student.trained)
        if not parts:
            return self.source.read(name)
        full = self._gather(name)
        if name in full:
            return full[name].to("cpu", self.source.dtype(name))
        scale = self.student.decoder.get_submodule(name.removesuffix(".weight")).lora_scale
        pair = (full[part] for part in parts)
        return merge_lora(name, self.source.read(name), *pair, scale).cpu()

    def _gather(self, name: str) -> dict[str, torch.Tensor]:
        layouts, trained = self.student.decoder.layouts, self.student.trained
        return {
            part: gather_full(trained[part].detach(), layouts[part], self.axis)
            for part in trained_parts(name, trained)
        }


def gather_full(local: torch.Tensor, layout: Layout, axis: Axis) -> torch.Tensor:
    """The whole tensor from its slices over the tp axis; a collective call."""
    if layout.dim is None or axis.size == 1:
        return local
    parts = axis.size // layout.holders
    longest = -(-layout.full_shape[layout.dim] // parts)
    moved = local.movedim(layout.dim, 0)
    padded = moved.new_zeros(longest, *moved.shape[1:])
    padded[: moved.shape[0]] = moved
    gathered = all_gather_tokens(padded, axis).unflatten(0, (axis.size, longest))
    whole = gathered[:: layout.holders].flatten(0, 1)[: layout.full_shape[layout.dim]]
    return whole.movedim(0, layout.dim).contiguous()
