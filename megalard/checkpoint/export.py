"""Saving the student as a Hugging Face directory that transformers 4.57 and 5 both read.

What was not trained is copied from the source files bit for bit; what was trained is gathered from
its slices, LoRA pairs are merged in fp32, and the result is rounded to the source file's dtype.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megalard.checkpoint.huggingface import HuggingFaceWeights
from megalard.distill.student import Student
from megalard.errors import UserError
from megalard.parallel.collectives import all_gather_tokens
from megalard.parallel.layout import Layout
from megalard.parallel.mesh import Axis, Mesh

_SHARD_BYTES = 4 * 2**30
_GENERATION = "generation_config.json"


def save_student(
    directory: str | Path,
    student: Student,
    source: HuggingFaceWeights,
    config: dict,
    companions: Iterable[Path],
    mesh: Mesh,
) -> None:
    """Write the merged student; a collective call of all ranks, in which rank 0 writes.

    The directory appears complete or not at all: files go to a sibling that is renamed at the end.

    Args:
        directory: where to; replaced if it holds an earlier save.
        source: the files the student started from.
        config: the student's ``config.json``.
        companions: files copied beside the weights, such as the tokenizer's.

    Raises:
        UserError: on every rank, when rank 0 cannot write.
    """
    directory = Path(directory)
    error = None
    if mesh.dp.rank == 0:
        merged = _MergedTensors(student, source, mesh.tp)
        if mesh.world.rank == 0:
            try:
                _write(directory, merged, config, [*companions, source.directory / _GENERATION])
            except OSError as raised:
                error = f"cannot write {directory}: {raised}"
                merged.drain()
        else:
            merged.drain()
    if mesh.world.size > 1:
        told = [error]
        dist.broadcast_object_list(told, src=0, group=mesh.world.group)
        error = told[0]
    if error is not None:
        raise UserError(error)


class _MergedTensors:
    """The student's tensors in the order of the source files; each trained one is a collective.

    Ranks other than 0 follow with ``drain``, so that every rank joins every gather in one order.
    """

    def __init__(self, student: Student, source: HuggingFaceWeights, axis: Axis):
        self.student, self.source, self.axis = student, source, axis
        self.pending = iter(source.names())

    def __iter__(self):
        for name in self.pending:
            yield name, self._tensor(name)

    def drain(self) -> None:
        """Take part in the gathers that are left."""
        for name in self.pending:
            if self._is_trained(name):
                self._tensor(name)

    def _is_trained(self, name: str) -> bool:
        return bool(self._trained_parts(name))

    def _trained_parts(self, name: str) -> list[str]:
        parts = [
            name,
            name.removesuffix("weight") + "lora_A",
            name.removesuffix("weight") + "lora_B",
        ]
        return [part for part in parts if part in self.student.trained]

    def _tensor(self, name: str) -> torch.Tensor:
        parts = self._trained_parts(name)
        if not parts:
            return self.source.read(name)
        layouts = self.student.decoder.layouts
        full = {
            part: gather_full(self.student.trained[part].detach(), layouts[part], self.axis)
            for part in parts
        }
        original = self.source.read(name)
        if name in full:
            return full[name].to("cpu", original.dtype)
        lora_a, lora_b = full[parts[0]], full[parts[1]]
        scale = self.student.decoder.get_submodule(name.removesuffix(".weight")).lora_scale
        merged = original.to(lora_a.device, torch.float32) + scale * (lora_b @ lora_a)
        return merged.to("cpu", original.dtype)


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


def _write(directory: Path, merged, config: dict, companions: list[Path]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    weight_map: dict[str, str] = {}
    total = 0
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    held_bytes = 0

    def flush() -> None:
        nonlocal held, held_bytes
        path = partial / f"shard-{len(shards)}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        shards.append(list(held))
        held, held_bytes = {}, 0

    for name, tensor in merged:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > _SHARD_BYTES:
            flush()
        held[name] = tensor.contiguous()
        held_bytes += size
        total += size
    flush()

    for number, names in enumerate(shards):
        final = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        (partial / f"shard-{number}.safetensors").rename(partial / final)
        weight_map |= dict.fromkeys(names, final)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in companions:
        if file.is_file():
            shutil.copyfile(file, partial / file.name)
    # rename cannot replace a full directory; the old save goes only once the new one is whole
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
