"""Hugging Face to sharded and back, streaming: no process holds more than a tensor or two."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from megalard.checkpoint.build import empty_decoder
from megalard.checkpoint.huggingface_writer import FILE_BYTES, write_huggingface
from megalard.checkpoint.open import Model
from megalard.checkpoint.peft import check_lora, write_adapter
from megalard.checkpoint.sharded.dcp_storage import LazySavePlanner
from megalard.checkpoint.sharded.manifest import written_by
from megalard.checkpoint.sharded.save_load import as_dtensor, save_sharded
from megalard.checkpoint.weights import Weights
from megalard.errors import UserError
from megalard.model.rope import rope_table, write_rope
from megalard.model.spec import ModelSpec
from megalard.parallel.agreement import checked_meanwhile
from megalard.parallel.mesh import SINGLE, Axis, Mesh
from megalard.parallel.tensor.layout import Layout, check_divisible, parameter_layout

Progress = Callable[[int], None]


def import_model(
    source: Model,
    directory: str | Path,
    mesh: Mesh,
    axis: Axis,
    file_bytes: int = FILE_BYTES,
    progress: Progress = lambda count: None,
) -> None:
    """Write any model as a sharded checkpoint, each tp rank its own slices.

    Args:
        source: what is read; every rank reads only the slices it writes.
        directory: the checkpoint; it must not exist or be empty.
        mesh: all ranks are tp ranks.
        axis: all ranks, with a CPU group.

    Raises:
        UserError: on every rank, for bad input or when any rank cannot write.
    """
    check_complete(source.weights, source.spec)
    layouts = weight_layouts(source.weights, source.spec, mesh.tp)
    tensors = {
        name: as_dtensor(
            torch.empty(layout.local_shape, dtype=source.weights.dtype(name), device="meta"),
            layout,
            mesh,
        )
        for name, layout in layouts.items()
    }
    head = {
        "kind": "model",
        "config": source.spec.hf_config,
        "base": None,
        "trained": None,
        "training": None,
        "written_by": written_by(mesh),
    }
    # a Hugging Face directory records no checksums, and a thread more costs memory
    checking = (
        nullcontext(lambda: None)
        if source.checked_bytes() == 0
        else checked_meanwhile(partial(source.check_sums, axis), axis)
    )
    with checking as agreed:
        save_sharded(
            directory,
            tensors,
            head,
            axis,
            companions=source.companions,
            planner=LazySavePlanner(partial(_read_box, source.weights)),
            file_bytes=file_bytes,
            progress=progress,
            before_commit=agreed,
        )


def _read_box(weights: Weights, name: str, start, size) -> torch.Tensor:
    shape = weights.shape(name)
    split = [dim for dim in range(len(shape)) if size[dim] != shape[dim]]
    if not split:
        return weights.read(name)
    (dim,) = split
    return weights.read(name, Layout(shape, dim, start[dim], size[dim], 1))


def weight_layouts(weights: Weights, spec: ModelSpec, axis: Axis) -> dict[str, Layout]:
    """Every tensor's slice on this rank; what the model does not know is kept whole.

    Raises:
        UserError: the model cannot be split over this many ranks.
    """
    check_divisible(spec, axis.size)
    unknown, layouts = set(unknown_tensors(weights, spec)), {}
    for name in weights.names():
        shape = weights.shape(name)
        layouts[name] = (
            Layout(shape, None, 0, 0, axis.size)
            if name in unknown
            else parameter_layout(name, shape, spec, axis.rank, axis.size)
        )
    return layouts


def unknown_tensors(weights: Weights, spec: ModelSpec) -> list[str]:
    """What stands in the files and is no part of the model, such as old files' ``inv_freq``."""
    known = {*empty_decoder(spec, rope_table(spec), SINGLE).layouts, "lm_head.weight"}
    return [name for name in weights.names() if name not in known]


def check_complete(weights: Weights, spec: ModelSpec) -> None:
    """Refuse a model that lacks a tensor its config implies, or has it in another shape.

    Raises:
        UserError: naming the first.
    """
    for name, layout in empty_decoder(spec, rope_table(spec), SINGLE).layouts.items():
        if weights.shape(name) != layout.full_shape:
            raise UserError(
                f"tensor {name} in {weights.directory} has shape {list(weights.shape(name))}, but "
                f"config.json implies {list(layout.full_shape)}: the files do not belong together"
            )


def export_model(
    model: Model,
    directory: str | Path,
    axis: Axis,
    file_bytes: int = FILE_BYTES,
    progress: Progress = lambda count: None,
) -> None:
    """Write any model as a Hugging Face directory with merged weights, the files shared out.

    The source's checksums are compared at the same time; nothing appears if one does not hold.

    Raises:
        UserError: on every rank, for bad input or when any rank cannot write.
    """
    with checked_meanwhile(partial(model.check_sums, axis), axis) as agreed:
        write_huggingface(
            directory,
            model.weights,
            export_config(model.spec),
            model.companions,
            axis=axis,
            file_bytes=file_bytes,
            progress=progress,
            ahead=True,
            before_commit=agreed,
        )


def export_adapter(
    model: Model, directory: str | Path, progress: Progress = lambda count: None
) -> None:
    """Write a run's LoRA pairs as a PEFT adapter with the student's config beside it.

    Raises:
        UserError: the model is no run's checkpoint, or trained something else.
    """
    check_adapter(model)
    with checked_meanwhile(model.check_sums, SINGLE) as agreed:
        write_adapter(
            directory,
            model.trained,
            model.manifest.trained,
            export_config(model.spec),
            str(model.base.directory.absolute()),
            model.companions,
            progress,
            agreed,
        )


def check_adapter(model: Model) -> None:
    """Refuse a model without LoRA pairs.

    Raises:
        UserError: the model is no run's checkpoint, or trained something else.
    """
    if model.kind != "training":
        raise UserError(
            f"{model.directory} is no checkpoint of a run ({model.kind}): there is no adapter in it"
        )
    check_lora(model.directory, model.manifest.trained)


def export_config(spec: ModelSpec) -> dict:
    """``config.json`` with RoPE in the spellings of transformers 4 and 5."""
    return write_rope(spec.hf_config, spec.rope, spec.head_dim)


def check_target(directory: str | Path) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: the directory exists and is not empty, or is no directory.
    """
    directory = Path(directory)
    try:
        taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{str(directory)!r} is no path: {error}") from None
    if taken:
        raise UserError(f"{directory} is not empty: choose another directory")
    if directory.is_symlink():
        raise UserError(f"{directory} is a link: give the directory it leads to, or another")
    if not directory.name or directory.is_mount():
        # it is written beside its name, and renamed
        raise UserError(f"{directory} cannot be given a new content: choose a directory in it")
    # the first that exists of those it lies in
    above = next(path for path in directory.absolute().parents if path.exists())
    if not above.is_dir():
        raise UserError(f"{above} is no directory: {directory} cannot be made")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {above}: choose another place than {directory}")


def size_of(weights: Weights) -> int:
    """Bytes of all tensors."""
    return sum(
        torch.Size(weights.shape(name)).numel() * weights.dtype(name).itemsize
        for name in weights.names()
    )


def parse_size(text: str) -> int:
    """``4GiB``, ``500MB`` or a number of bytes.

    Raises:
        UserError: it is no size.
    """
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", 1):
        units |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power, letter: 1024**power}
    number = text.rstrip("BKMGTIbkmgti ")
    try:
        value = float(number) * units[text[len(number) :].strip().upper()]
        int(value)
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"{json.dumps(text)} is no size: write it as 4GiB or 500MB") from None
    if not value >= 1:
        raise UserError(f"a file size of {text} holds nothing: write it as 4GiB or 500MB")
    return int(value)
