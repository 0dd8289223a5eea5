"""Convert models between Hugging Face and the sharded format, one or two tensors at a time."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megalard.checkpoint.build import check_complete, full_slices
from megalard.checkpoint.companions import Companion, for_window
from megalard.checkpoint.huggingface import write_huggingface
from megalard.checkpoint.open import StoredModel
from megalard.checkpoint.peft import check_lora, write_adapter
from megalard.checkpoint.read_back import reading_back
from megalard.checkpoint.sharded.dcp_storage import LazySavePlanner
from megalard.checkpoint.sharded.manifest import naming_bad_entries, written_by
from megalard.checkpoint.sharded.save_load import as_dtensor, save_sharded
from megalard.checkpoint.stored_names import StoredWeights, stored_pairs
from megalard.checkpoint.weights import ConvertedWeights, MergedWeights, Weights, dtype_name
from megalard.checkpoint.write_options import WriteOptions
from megalard.errors import UserError, shown
from megalard.model.export_config import export_config
from megalard.model.parameter_slice import ParameterSlice, full_slice
from megalard.model.rope import rope_table
from megalard.model.spec import ModelSpec
from megalard.parallel.agreement import checked_meanwhile
from megalard.parallel.mesh import SINGLE, Axis, Mesh
from megalard.parallel.tensor.slices import check_divisible, slice_of_parameter

# The values of the settings of these names; the first one is the default.
EXPORT_DTYPES = ("source", "float32", "bfloat16", "float16")
ROUNDINGS = ("nearest", "stochastic")


def import_model(
    source: StoredModel, directory: str | Path, mesh: Mesh, axis: Axis, options: WriteOptions
) -> None:
    """Write any model as a sharded checkpoint; each tp rank writes its own slices.

    The checksums that the source records are compared meanwhile, and the checkpoint gets its name
    only if they hold.

    Args:
        source: the model; every rank reads only the slices that it writes.
        directory: the checkpoint; it must not exist or be empty.
        mesh: a mesh in which all ranks are tp ranks.
        axis: all ranks, with a process group for CPU tensors.

    Raises:
        UserError: on every rank, for bad input, or if any rank cannot write.
    """
    check_complete(source.weights, source.spec)
    slices = weight_slices(source.weights, source.spec, mesh.tp)
    tensors = {
        name: as_dtensor(
            torch.empty(held.local_shape, dtype=source.weights.dtype(name), device="meta"),
            held,
            mesh,
        )
        for name, held in slices.items()
    }
    sections = {
        "kind": "model",
        "config": source.spec.hf_config,
        "base": None,
        "trained": None,
        "training": None,
        "written_by": written_by(mesh),
    }
    # A Hugging Face directory records no checksums, and one more thread costs memory.
    checking = (
        nullcontext(lambda: None)
        if source.checked_bytes() == 0
        else checked_meanwhile(partial(source.check_sums, axis), axis)
    )
    with checking as wait_for_checksums:
        save_sharded(
            directory,
            tensors,
            sections,
            axis,
            replace(options, companions=source.companions, before_commit=wait_for_checksums),
            planner=LazySavePlanner(partial(_read_box, source.weights)),
        )


def _read_box(weights: Weights, name: str, start, size) -> torch.Tensor:
    shape = weights.shape(name)
    split_dims = [dim for dim in range(len(shape)) if size[dim] != shape[dim]]
    if not split_dims:
        return weights.read(name)
    (dim,) = split_dims
    return weights.read(name, ParameterSlice(shape, dim, start[dim], size[dim], 1))


def weight_slices(weights: Weights, spec: ModelSpec, axis: Axis) -> dict[str, ParameterSlice]:
    """Return the slice of every tensor on this rank. Tensors that are not the model's are full.

    Raises:
        UserError: the model cannot be split over this many ranks.
    """
    check_divisible(spec, axis.size)
    unknown, slices = set(unknown_tensors(weights, spec)), {}
    for name in weights.names():
        shape = weights.shape(name)
        slices[name] = (
            full_slice(shape, axis.size)
            if name in unknown
            else slice_of_parameter(name, shape, spec, axis.rank, axis.size)
        )
    return slices


def unknown_tensors(weights: Weights, spec: ModelSpec) -> list[str]:
    """Return the tensors in the files that are not part of the model, such as ``inv_freq``."""
    model_names = {*full_slices(spec), "lm_head.weight"}
    return [name for name in weights.names() if name not in model_names]


@dataclass(frozen=True)
class ExportRounding:
    """How the weights of an export are rounded.

    Attributes:
        dtype: the dtype of all floating-point tensors; None keeps that of each tensor.
        stochastic: whether trained weights are rounded stochastically.
    """

    dtype: torch.dtype | None = None
    stochastic: bool = False


def export_rounding(
    model: StoredModel, dtype: str | None = None, rounding: str | None = None
) -> ExportRounding:
    """Return how an export is rounded: as asked for, or as the run of a checkpoint is configured.

    Args:
        dtype, rounding: as ``checkpoint.export_dtype`` and ``checkpoint.export_rounding``. None
            takes the setting of the run whose checkpoint the model is, and otherwise ``source`` and
            ``nearest``.

    Raises:
        UserError: the checkpoint records something that is neither, or the model has no trained
            weights that could be rounded stochastically.
    """
    recorded: dict = {}
    if model.kind == "training":
        with naming_bad_entries(model.manifest):
            recorded = model.manifest.training["config"].get("checkpoint", {})
            for key, values in (("export_dtype", EXPORT_DTYPES), ("export_rounding", ROUNDINGS)):
                if recorded.get(key, values[0]) not in values:  # earlier versions have no such key
                    raise ValueError(f"checkpoint.{key} is {shown(recorded[key])}")
    if rounding == "stochastic" and model.trained is None:
        raise UserError(
            f"--rounding stochastic is for trained weights, and {model.directory} has none of its "
            "own: give a checkpoint of a run or an adapter"
        )
    dtype = dtype or recorded.get("export_dtype", "source")
    rounding = rounding or recorded.get("export_rounding", "nearest")
    return ExportRounding(
        None if dtype == "source" else getattr(torch, dtype), rounding == "stochastic"
    )


def weights_to_export(model: StoredModel, rounding: ExportRounding) -> Weights:
    """Return the merged weights under the names of the files, rounded."""
    weights = model.weights
    if isinstance(weights, MergedWeights):  # trained weights are rounded once, from fp32
        weights = weights.rounded_to(rounding.dtype, rounding.stochastic)
    if rounding.dtype is not None:
        weights = ConvertedWeights(weights, rounding.dtype)
    return StoredWeights(weights, model.spec)


def export_model(
    model: StoredModel,
    directory: str | Path,
    axis: Axis,
    options: WriteOptions,
    rounding: ExportRounding = ExportRounding(),
) -> None:
    """Write any model as a Hugging Face directory with merged weights; ranks share the files.

    The checksums that the model records are compared meanwhile, and nothing appears if one does not
    hold.

    Args:
        rounding: as ``export_rounding`` returns it.

    Raises:
        UserError: on every rank, for bad input, or if any rank cannot write.
    """
    config = export_config(model.spec)
    if rounding.dtype is not None:
        config |= dict.fromkeys(("dtype", "torch_dtype"), dtype_name(rounding.dtype))
    with checked_meanwhile(partial(model.check_sums, axis), axis) as wait_for_checksums:
        write_huggingface(
            directory,
            weights_to_export(model, rounding),
            config,
            replace(
                options,
                companions=_companions(model),
                before_commit=wait_for_checksums,
                check=reading_back(model.spec, rope_table(model.spec), directory),
            ),
            axis=axis,
            ahead=True,
        )


def export_adapter(model: StoredModel, directory: str | Path, options: WriteOptions) -> None:
    """Write a run's LoRA pairs as a PEFT adapter with the student's config.json.

    Raises:
        UserError: the model is not a run's checkpoint, or its run did not train LoRA pairs.
    """
    check_adapter(model)
    pairs, trained = stored_pairs(model.trained, model.manifest.trained, model.spec)
    with checked_meanwhile(model.check_sums, SINGLE) as wait_for_checksums:
        write_adapter(
            directory,
            pairs,
            trained,
            export_config(model.spec),
            str(model.base.directory.absolute()),
            replace(
                options,
                companions=_companions(model),
                before_commit=wait_for_checksums,
                check=reading_back(model.spec, rope_table(model.spec), directory),
            ),
        )


def _companions(model: StoredModel) -> tuple[Companion, ...]:
    """Return the files to write next to a model; those of a student get the student's lengths."""
    if model.base is None:
        return model.companions
    return for_window(model.companions, model.base.window, model.window)


def check_adapter(model: StoredModel) -> None:
    """Refuse a model without LoRA pairs.

    Raises:
        UserError: the model is not a run's checkpoint, or its run did not train LoRA pairs.
    """
    if model.kind != "training":
        raise UserError(
            f"{model.directory} is not a run's checkpoint ({model.kind}): there is no adapter in it"
        )
    check_lora(model.directory, model.manifest.trained)


def check_target(directory: str | Path) -> None:
    """Refuse a target directory that could not be created, or whose content would be overwritten.

    Raises:
        UserError: the directory cannot be used; the message names it and the reason.
    """
    directory = Path(directory)
    try:
        is_taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{shown(str(directory))} is not a path: {error}") from None
    if is_taken:
        raise UserError(f"{directory} is not empty: choose another directory")
    if directory.is_symlink():
        raise UserError(f"{directory} is a link: give the directory it leads to, or another one")
    if not directory.name or directory.is_mount():
        # The directory is written under another name and then renamed.
        raise UserError(f"{directory} cannot be replaced: choose a directory inside it")
    parent = next(path for path in directory.absolute().parents if path.exists())
    if not parent.is_dir():
        raise UserError(f"{parent} is not a directory, so {directory} cannot be made")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {parent}: choose another place than {directory}")


def parse_size(text: str) -> int:
    """Return the number of bytes of a size such as ``4GiB``, ``500MB`` or ``1000000``.

    Raises:
        UserError: the text is not a size.
    """
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", 1):
        units |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power, letter: 1024**power}
    number = text.rstrip("BKMGTIbkmgti ")
    try:
        value = float(number) * units[text[len(number) :].strip().upper()]
        int(value)
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"{shown(text)} is not a size: write it as 4GiB or 500MB") from None
    if not value >= 1:
        raise UserError(f"a file size of {shown(text)} is too small: write it as 4GiB or 500MB")
    return int(value)
