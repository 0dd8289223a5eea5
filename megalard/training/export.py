"""Save the student as a Hugging Face directory that transformers 4.57 and 5 both read.

Tensors that were not trained are copied from the source files bit for bit. Trained tensors are
gathered from their slices, LoRA pairs are merged in fp32, and the result is rounded to the dtype of
the source file, or to the dtype that the user chose for all tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from megalard.checkpoint.companions import Companion
from megalard.checkpoint.huggingface import plan_files, write_huggingface
from megalard.checkpoint.read_back import reading_back
from megalard.checkpoint.rounding import RoundingLoss, rounded
from megalard.checkpoint.stored_names import StoredWeights
from megalard.checkpoint.weights import Weights, dtype_name, is_finite, merge_lora, trained_parts
from megalard.checkpoint.write_options import FILE_BYTES, WriteOptions
from megalard.distill.student import Student
from megalard.errors import UserError
from megalard.model.parameter_slice import ParameterSlice
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
    dtype: torch.dtype | None = None,
    stochastic: bool = False,
) -> RoundingLoss:
    """Write the merged student; a collective call of all ranks, in which rank 0 writes.

    The directory appears completely or not at all. One tensor at a time is gathered, so that the
    memory of a rank does not grow with the model.

    Args:
        directory: the target; an earlier export there is replaced.
        source: the weights that the student started from.
        config: the student's ``config.json``.
        companions: files that are copied next to the weights, such as the tokenizer's.
        dtype: the dtype of all floating-point tensors; None keeps that of each source tensor.
        stochastic: whether trained weights are rounded stochastically.

    Returns:
        On rank 0, what rounding took away from the trained weights.

    Raises:
        UserError: on every rank, if rank 0 cannot write.
    """
    sentence, loss = None, RoundingLoss()
    if dtype is not None:
        name = dtype_name(dtype)
        config = {**config, "dtype": name, "torch_dtype": name}
    merged = _MergedTensors(student, source, mesh.tp, dtype, stochastic, loss)
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
    return loss


class _MergedTensors:
    """The merged tensors of the student. Reading a trained tensor is a collective call.

    Ranks other than rank 0 follow with ``drain``, so that every rank joins every gather in the same
    order.

    Attributes:
        pending: the tensors that have not been read, in the order in which they will be.
    """

    def __init__(
        self,
        student: Student,
        source: Weights,
        axis: Axis,
        dtype: torch.dtype | None,
        stochastic: bool,
        loss: RoundingLoss,
    ):
        self.student, self.source, self.axis = student, source, axis
        self.directory = source.directory
        self.shape, self.files = source.shape, source.files
        self._dtype, self._stochastic, self._loss = dtype, stochastic, loss
        self.pending: list[str] = []

    def names(self) -> list[str]:
        # A tied head in the files is left out: it would differ from a trained embedding, and
        # transformers 5 would then untie the two.
        is_tied = self.student.decoder.spec.tied_embeddings
        return [n for n in self.source.names() if not (is_tied and n == "lm_head.weight")]

    def dtype(self, name: str) -> torch.dtype:
        stored = self.source.dtype(name)
        return self._dtype if self._dtype and stored.is_floating_point else stored

    def drain(self) -> None:
        """Join the gathers that remain."""
        for name in list(self.pending):
            if trained_parts(name, self.student.changed):
                self._gather(name)

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        """Return the merged tensor on the CPU, in the dtype in which it is stored."""
        assert held is None, "the student is exported as full tensors"
        self.pending.remove(name)
        parts, dtype = trained_parts(name, self.student.changed), self.dtype(name)
        source = self.source.read(name)
        merged = self._merge(name, parts, source, dtype) if parts else source.to(dtype)
        if (parts or dtype != source.dtype) and not is_finite(merged):
            raise UserError(
                f"{name} holds NaN or infinity as {str(dtype).removeprefix('torch.')}: choose "
                "another checkpoint.export_dtype, or go back to an older checkpoint and lower "
                "optimizer.learning_rate"
            )
        return merged

    def _merge(
        self, name: str, parts: list[str], source: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        full = self._gather(name)
        if parts == [name]:
            exact = full[name].to("cpu")
            merged = rounded(exact, dtype, name, 0, self._stochastic)
            self._loss.add(source, exact, merged)
            return merged
        projection = self.student.decoder.get_submodule(name.removesuffix(".weight"))
        scale = cast(Projection, projection).lora_scale
        lora_a, lora_b = (full[part] for part in parts[-2:])
        # If an earlier stage changed the weight itself, the pair is added to the changed weight.
        # The sum takes the memory of the weight, which may be the student's own.
        original = full[name].clone() if name in full else source

        def count(rows: slice, exact: torch.Tensor, stored: torch.Tensor) -> None:
            self._loss.add(source[rows], exact, stored)

        arguments = name, original, lora_a, lora_b, scale, dtype, self._stochastic
        return merge_lora(*arguments, count).to("cpu")

    def _gather(self, name: str) -> dict[str, torch.Tensor]:
        student, decoder = self.student, self.student.decoder
        device = decoder.model.embed_tokens.weight.device
        return {
            part: gather_full(student.value(part).to(device), decoder.slices[part], self.axis)
            for part in trained_parts(name, student.changed)
        }


def gather_full(local: torch.Tensor, held: ParameterSlice, axis: Axis) -> torch.Tensor:
    """Return the full tensor of this rank's slice; a collective call over the tp axis."""
    if held.dim is None or axis.size == 1:
        return local
    parts = axis.size // held.replicas
    longest = -(-held.full_shape[held.dim] // parts)
    moved = local.movedim(held.dim, 0)
    padded = moved.new_zeros(longest, *moved.shape[1:])
    padded[: moved.shape[0]] = moved
    gathered = all_gather_tokens(padded, axis).unflatten(0, (axis.size, longest))
    full = gathered[:: held.replicas].flatten(0, 1)[: held.full_shape[held.dim]]
    return full.movedim(0, held.dim).contiguous()
