"""Save the student as a Hugging Face directory that transformers 4.57 and 5 both read.

Tensors that were not trained are copied from the source files bit for bit. Trained tensors are
gathered from their slices, LoRA pairs are merged in fp32, and the result is rounded to the dtype of
the source file.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from megalard.checkpoint.companions import Companion
from megalard.checkpoint.huggingface import plan_files, write_huggingface
from megalard.checkpoint.read_back import reading_back
from megalard.checkpoint.stored_names import StoredWeights
from megalard.checkpoint.weights import Weights, is_finite, merge_lora, trained_parts
from megalard.checkpoint.write_options import FILE_BYTES, WriteOptions
from megalard.distill.student import Student
from megalard.errors import UserError
from megalard.model.layout import Layout
from megalard.model.projection import Projection
from megalard.parallel.agreement import from_rank_0
from megalard.parallel.collectives import all_gather_tokens
from megalard.parallel.mesh import Axis, Mesh

_SHARD_BYTES = FILE_BYTES


def save_student(
    directory: str | Path,
    student: Student,
    source: Weights,
    config: dict,
    companions: tuple[Companion, ...],
    mesh: Mesh,
) -> None:
    """Write the merged student; a collective call of all ranks, in which rank 0 writes.

    The directory appears completely or not at all. One tensor at a time is gathered, so that the
    memory of a rank does not grow with the model.

    Args:
        directory: the target; an earlier export there is replaced.
        source: the weights that the student started from.
        config: the student's ``config.json``.
        companions: files that are copied next to the weights, such as the tokenizer's.

    Raises:
        UserError: on every rank, if rank 0 cannot write.
    """
    sentence = None
    if mesh.dp.rank == 0:
        merged = _MergedTensors(student, source, mesh.tp)
        stored = StoredWeights(merged, student.decoder.spec)
        files = plan_files(stored, _SHARD_BYTES)
        merged.pending = [part for file in files for name in file for part in stored.parts[name]]
        if mesh.is_rank_0:
            check = reading_back(student.decoder.spec, student.decoder.rope, directory)
            options = WriteOptions(companions, _SHARD_BYTES, check=check)
            try:
                write_huggingface(directory, stored, config, options, replace=True)
            except UserError as error:
                sentence = str(error)
                merged.drain()
        else:
            merged.drain()
    sentence = from_rank_0(sentence, mesh.world)
    if sentence is not None:
        raise UserError(sentence)


class _MergedTensors:
    """The merged tensors of the student. Reading a trained tensor is a collective call.

    Ranks other than rank 0 follow with ``drain``, so that every rank joins every gather in the same
    order.

    Attributes:
        pending: the tensors that have not been read, in the order in which they will be.
    """

    def __init__(self, student: Student, source: Weights, axis: Axis):
        self.student, self.source, self.axis = student, source, axis
        self.directory = source.directory
        self.shape, self.dtype, self.files = source.shape, source.dtype, source.files
        self.pending: list[str] = []

    def names(self) -> list[str]:
        # A tied head in the files is left out: it would differ from a trained embedding, and
        # transformers 5 would then untie the two.
        is_tied = self.student.decoder.spec.tied_embeddings
        return [n for n in self.source.names() if not (is_tied and n == "lm_head.weight")]

    def drain(self) -> None:
        """Join the gathers that remain."""
        for name in list(self.pending):
            if trained_parts(name, self.student.changed):
                self._gather(name)

    def read(self, name: str, layout: Layout | None = None) -> torch.Tensor:
        """Return the merged tensor in the source's dtype, on the CPU."""
        assert layout is None, "the student is exported as full tensors"
        self.pending.remove(name)
        parts = trained_parts(name, self.student.changed)
        if not parts:
            return self.source.read(name)
        full, dtype = self._gather(name), self.source.dtype(name)
        original = full[name] if name in full else self.source.read(name)
        if parts != [name]:
            projection = self.student.decoder.get_submodule(name.removesuffix(".weight"))
            scale = cast(Projection, projection).lora_scale
            lora_a, lora_b = (full[part] for part in parts[-2:])
            original = merge_lora(name, original, lora_a, lora_b, scale)
        merged = original.to("cpu", dtype)
        if not is_finite(merged):
            raise UserError(
                f"the trained {name} holds NaN or infinity as {str(dtype).removeprefix('torch.')}: "
                "go back to an older checkpoint, and lower optimizer.learning_rate"
            )
        return merged

    def _gather(self, name: str) -> dict[str, torch.Tensor]:
        decoder, changed = self.student.decoder, self.student.changed
        device = decoder.model.embed_tokens.weight.device
        return {
            part: gather_full(changed[part].detach().to(device), decoder.layouts[part], self.axis)
            for part in trained_parts(name, changed)
        }


def gather_full(local: torch.Tensor, layout: Layout, axis: Axis) -> torch.Tensor:
    """Return the full tensor of this rank's slice; a collective call over the tp axis."""
    if layout.dim is None or axis.size == 1:
        return local
    parts = axis.size // layout.replicas
    longest = -(-layout.full_shape[layout.dim] // parts)
    moved = local.movedim(layout.dim, 0)
    padded = moved.new_zeros(longest, *moved.shape[1:])
    padded[: moved.shape[0]] = moved
    gathered = all_gather_tokens(padded, axis).unflatten(0, (axis.size, longest))
    full = gathered[:: layout.replicas].flatten(0, 1)[: layout.full_shape[layout.dim]]
    return full.movedim(0, layout.dim).contiguous()
