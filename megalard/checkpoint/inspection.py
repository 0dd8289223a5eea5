"""Describe a checkpoint or a model directory in words and numbers."""

from __future__ import annotations

import math
from pathlib import Path

from megalard.checkpoint.build import check_complete
from megalard.checkpoint.convert import unknown_tensors
from megalard.checkpoint.open import open_model
from megalard.checkpoint.peft import AdapterWeights
from megalard.checkpoint.provenance import check_files
from megalard.checkpoint.sharded.manifest import STATE_PREFIXES, Manifest, incomplete
from megalard.checkpoint.weights import Weights, size_of
from megalard.errors import UserError
from megalard.files.safetensors import DTYPES
from megalard.files.writing import Progress, no_progress


def describe_checkpoint(manifest: Manifest) -> dict:
    """Return what a checkpoint contains, as facts by name.

    Raises:
        UserError: the manifest lacks an entry.
    """
    try:
        return _describe(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise incomplete(manifest, error) from None


def _describe(manifest: Manifest) -> dict:
    body, sizes, counts = manifest.body, {}, {}
    for name, tensor in manifest.tensors.items():
        is_state = manifest.kind == "training" and name.startswith(STATE_PREFIXES)
        group = name.split(".")[0] if is_state else "weights"
        elements = math.prod(tensor["shape"])
        counts[group] = counts.get(group, 0) + 1
        sizes[group] = sizes.get(group, 0) + elements * DTYPES[tensor["dtype"]].itemsize
    writer, trained, training = body["written_by"], manifest.trained, manifest.training
    facts = {
        "kind": {"model": "a whole model", "training": "a run's state"}[manifest.kind],
        "model": _shape(manifest.config),
        "tensors": ", ".join(f"{n} {g} ({readable(sizes[g])})" for g, n in counts.items()),
        "files": len(manifest.files),
        "bytes": sum(file["size"] for file in manifest.files.values()),
        "written by": f"{writer['ranks']} ranks (dp {writer['dp']} x cp {writer['cp']} x tp "
        f"{writer['tp']}) on {writer['device']}, "
        + ", ".join(f"{name} {version}" for name, version in writer["libraries"].items()),
        "trained": "nothing" if trained is None else _trained(trained),
        "step": "none" if training is None else _position(training),
        "base": "none" if manifest.base is None else manifest.base["path"],
        "teacher": "the base" if manifest.teacher is None else manifest.teacher["path"],
        "complete": "yes",
    }
    if manifest.training is None:
        del facts["teacher"]
    return facts


def _position(training: dict) -> str:
    config = training["config"]
    stages = (config.get("stages") or {}).values()
    steps = sum(stage["optimizer"]["steps"] for stage in stages or [config])
    blocks_read = sum(stream["blocks_read"] for stream in training["data"].values())
    return f"{training['step']} of {steps}, seed {training['seed']}, {blocks_read} blocks read"


def _trained(trained: dict) -> str:
    elements = sum(math.prod(shape) for shape in trained["tensors"].values())
    mode = trained["mode"]
    if trained["lora"]:
        mode += " rank {rank}, alpha {alpha:g} on {}".format(
            ", ".join(trained["lora"]["targets"]), **trained["lora"]
        )
    return f"{mode}: {elements:,} parameters in {len(trained['tensors'])} tensors"


def _shape(config: dict) -> str:
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    return f"{config['model_type']}, {layers} layers of {hidden}"


def describe_model(directory: Path) -> dict:
    """Return what a Hugging Face directory contains; it records no checksums.

    Raises:
        UserError: the directory is not a model, or is damaged or incomplete.
    """
    model = open_model(directory)
    spec, weights = model.spec, model.weights
    check_complete(weights, spec)
    unknown = unknown_tensors(weights, spec)
    not_in_model = (
        {"not in model": f"{len(unknown)} tensors, such as {unknown[0]}"} if unknown else {}
    )
    return {
        "kind": "a Hugging Face model",
        "model": _shape(spec.hf_config),
        **_contents(weights),
        **not_in_model,
        "complete": "yes",
        "checksums": "none are recorded",
    }


def describe_adapter(directory: Path) -> dict:
    """Return what a PEFT adapter contains; it records no checksums, and its base is not opened.

    Raises:
        UserError: the adapter is damaged or is not plain LoRA.
    """
    weights = AdapterWeights(directory)
    targets = sorted({name.split(".")[-2] for name in weights.names()})
    elements = sum(math.prod(weights.shape(name)) for name in weights.names())
    return {
        "kind": "a PEFT adapter",
        **_contents(weights),
        "trained": f"lora rank {weights.config['r']}, alpha {weights.config['lora_alpha']:g} on "
        f"{', '.join(targets)}: {elements:,} parameters",
        "base": weights.config.get("base_model_name_or_path") or "none is named",
        "complete": "yes",
        "checksums": "none are recorded",
    }


def _contents(weights: Weights) -> dict:
    files = weights.files()
    return {
        "tensors": f"{len(weights.names())} ({readable(size_of(weights))})",
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
    }


def provenance_problem(
    note: dict,
    directory: Path,
    with_checksums: bool,
    role: str,
    progress: Progress = no_progress,
) -> str | None:
    """Return what is wrong with a model that a run's checkpoint refers to; None if nothing is.

    Args:
        note: the manifest's note of the model.
        directory: where its files are looked for.
        with_checksums: whether the content of the files is compared, in addition to their lengths.
        role: what the model is to the checkpoint, such as ``teacher``, for the error message.
    """
    try:
        check_files(note, directory, progress=progress, role=role, with_checksums=with_checksums)
    except UserError as error:
        return str(error)
    return None


def readable(count: int) -> str:
    """Return a number of bytes in the largest unit that leaves at least 1, such as ``25.3 kB``."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} B"
