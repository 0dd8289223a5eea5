"""The state of a run as tensors of a checkpoint: fp32 masters, optimizer, random generators.

What has no state isn't saved but follows from the step: the learning rate, the blocks a step reads,
and LoRA's dropout masks are pure functions of it and of the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megalard.checkpoint.sharded.save_load import ShardedWeights, as_dtensor, load_sharded
from megalard.errors import UserError
from megalard.parallel.mesh import Axis
from megalard.parallel.tensor.layout import Layout
from megalard.training.step import Distiller

State = dict[str, tuple[torch.Tensor, Layout | None]]


def training_state(distiller: Distiller) -> State:
    """Name to this rank's tensor and its layout; None for one that is equal on all ranks.

    The optimizer's tensors are called ``optimizer.<key>.<parameter>``, the generators'
    ``rng.<device>.<rank>``. The tensors are the live ones, not copies.
    """
    layouts = distiller.student.decoder.layouts
    state: State = {}
    for name, parameter in distiller.student.trained.items():
        state[name] = (parameter.detach(), layouts[name])
        for key, value in distiller.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                layout = layouts[name] if value.shape == parameter.shape else None
                state[f"optimizer.{key}.{name}"] = (value.detach(), layout)
    mesh = distiller.mesh
    state[_rng_name("cpu", mesh.world.rank)] = (torch.get_rng_state(), None)
    if mesh.device.type == "cuda":
        device_state = torch.cuda.get_rng_state(mesh.device)
        state[_rng_name("cuda", mesh.world.rank)] = (device_state, None)
    return state


def as_tensors(state: State, distiller: Distiller) -> dict[str, torch.Tensor]:
    """The state as torch.distributed.checkpoint takes it."""
    return {
        name: tensor if layout is None else as_dtensor(tensor, layout, distiller.mesh)
        for name, (tensor, layout) in state.items()
    }


def optimizer_settings(optimizer: torch.optim.Optimizer) -> list[dict]:
    """The parameter groups but for their parameters, as JSON values."""
    groups = []
    for group in optimizer.param_groups:
        values = {key: value for key, value in group.items() if key != "params"}
        groups.append({k: v.item() if torch.is_tensor(v) else v for k, v in values.items()})
    return groups


def restore_state(distiller: Distiller, weights: ShardedWeights, axis: Axis) -> None:
    """Put a checkpoint's state in the place of a new run's; a collective call.

    Every rank reads only its slices, whatever topology wrote them.

    Raises:
        UserError: on every rank, when a tensor is missing, of another shape or cannot be read.
    """
    layouts, trained = distiller.student.decoder.layouts, distiller.student.trained
    saved, mesh = weights.manifest.tensors, distiller.mesh
    odd = set(weights.names()) ^ set(trained)
    if odd:
        raise UserError(
            f"{weights.directory} holds other trained tensors than this run, such as {min(odd)}"
        )
    tensors = {name: as_dtensor(p.detach(), layouts[name], mesh) for name, p in trained.items()}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for number, (name, parameter) in enumerate(trained.items()):
        for key in _keys(saved, name):
            full = f"optimizer.{key}.{name}"
            if weights.shape(full) == layouts[name].full_shape:
                value = torch.zeros_like(parameter, requires_grad=False)
                tensors[full] = as_dtensor(value, layouts[name], mesh)
            else:
                value = torch.zeros(weights.shape(full), dtype=weights.dtype(full))
                tensors[full] = value
            moments.setdefault(number, {})[key] = value
    generators = {}
    for kind in ("cpu", "cuda"):
        name = _rng_name(kind, mesh.world.rank)
        same = weights.manifest.body["written_by"]["ranks"] == mesh.world.size
        if same and name in saved and kind in ("cpu", mesh.device.type):
            generators[kind] = tensors[name] = torch.zeros(weights.shape(name), dtype=torch.uint8)
    load_sharded(weights, tensors, axis)

    written_with = weights.manifest.training["optimizer"].get("class")
    ours = type(distiller.optimizer).__name__
    if written_with not in (None, ours):
        raise UserError(
            f"checkpoint {weights.directory} was written with the optimizer {written_with} but "
            f"this run has {ours}: resume where the same optimizer package is installed"
        )
    groups = weights.manifest.training["optimizer"]["groups"]
    numbers = range(len(trained))
    # the optimizer puts each tensor where its kind expects it
    distiller.optimizer.load_state_dict(
        {"state": moments, "param_groups": [{**groups[0], "params": list(numbers)}]}
    )
    if "cpu" in generators:
        torch.set_rng_state(generators["cpu"])
    if "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], mesh.device)


def _keys(saved: Mapping[str, dict], name: str) -> list[str]:
    end = f".{name}"
    return [
        full.removeprefix("optimizer.").removesuffix(end)
        for full in (f"optimizer.{key}{end}" for key in ("exp_avg", "exp_avg_sq", "step"))
        if full in saved
    ]


def _rng_name(kind: str, rank: int) -> str:
    return f"rng.{kind}.{rank:05d}"
