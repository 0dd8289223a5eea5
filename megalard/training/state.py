"""The state of a stage as tensors of a checkpoint: fp32 weights, optimizer, random generators.

Everything else follows from the step and the configuration and is not saved: the learning rate, the
blocks that a step reads, and the dropout masks of LoRA are pure functions of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalard.checkpoint.sharded.read import ShardedWeights
from megalard.checkpoint.sharded.save_load import as_dtensor, load_sharded
from megalard.errors import UserError, shown
from megalard.model.parameter_slice import ParameterSlice
from megalard.parallel.mesh import Axis, Mesh
from megalard.training.step import Distiller

OPTIMIZER_CLASS = "AdamW"
"""The class whose state a checkpoint holds. apex's kernel updates the same state."""


@dataclass(frozen=True)
class StateTensor:
    """A tensor of the state, this rank's part.

    Attributes:
        value: the tensor.
        held: the slice of the parameter that it belongs to; None if it is equal on all
            ranks that have it.
        is_sharded: whether the ranks that hold the parameter have divided it among them.
    """

    value: torch.Tensor
    held: ParameterSlice | None = None
    is_sharded: bool = False

    def as_tensor(self, mesh: Mesh) -> torch.Tensor:
        """Return the tensor in the form that torch.distributed.checkpoint takes."""
        if self.held is None:
            return self.value
        return as_dtensor(self.value, self.held, mesh, self.is_sharded)


State = dict[str, StateTensor]
"""The state by the names of its tensors; see ``training_state``."""


def training_state(distiller: Distiller) -> State:
    """Return this rank's tensors by name; the live tensors and not copies.

    The tensors of the optimizer are called ``optimizer.<key>.<parameter>``, those of random
    generators ``rng.<device>.<rank>``.
    """
    slices = distiller.student.decoder.slices
    state: State = {}
    for name, part in distiller.masters.parts.items():
        state[name] = StateTensor(part.value, slices[name], part.is_sharded)
        for key, value in distiller.optimizer.state.get(part.parameter, {}).items():
            if isinstance(value, torch.Tensor):
                full_name = f"optimizer.{key}.{name}"
                if value.shape == part.parameter.shape:
                    moment = part.of(value.detach())
                    state[full_name] = StateTensor(moment, slices[name], part.is_sharded)
                else:
                    state[full_name] = StateTensor(value.detach())
    for name, value in distiller.student.carried.items():
        state[name] = StateTensor(value, slices[name])
    mesh = distiller.mesh
    state[_rng_name("cpu", mesh.world.rank)] = StateTensor(torch.get_rng_state())
    if mesh.device.type == "cuda":
        device_state = torch.cuda.get_rng_state(mesh.device)
        state[_rng_name("cuda", mesh.world.rank)] = StateTensor(device_state)
    return state


def optimizer_settings(optimizer: torch.optim.Optimizer) -> list[dict]:
    """Return the parameter groups as JSON values, without their parameters."""
    groups = []
    for group in optimizer.param_groups:
        values = {key: value for key, value in group.items() if key != "params"}
        groups.append({k: v.item() if torch.is_tensor(v) else v for k, v in values.items()})
    return groups


def restore_state(distiller: Distiller, weights: ShardedWeights, axis: Axis) -> None:
    """Replace the state of a new run by the state of a checkpoint; a collective call.

    Every rank reads only its slices, whatever layout of ranks wrote them.

    Raises:
        UserError: on every rank, if a tensor is missing, has another shape or cannot be read.
    """
    _check_optimizer(weights)
    slices, masters = distiller.student.decoder.slices, distiller.masters
    saved, mesh = weights.manifest.tensors, distiller.mesh
    different = set(weights.names()) ^ set(distiller.student.changed)
    if different:
        raise UserError(
            f"{weights.directory} holds other trained tensors than this run, such as "
            f"{min(different)}: choose another run.output"
        )
    tensors = {
        name: as_dtensor(value, slices[name], mesh)
        for name, value in distiller.student.carried.items()
    }
    parameters = masters.parameters
    moments: dict[int, dict[str, torch.Tensor]] = {}
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    for name, part in masters.parts.items():
        tensors[name] = as_dtensor(part.value, slices[name], mesh, part.is_sharded)
        state = moments.setdefault(numbers[part.parameter], {})
        for key in ("exp_avg", "exp_avg_sq", "step"):
            full_name = f"optimizer.{key}.{name}"
            if key == "step":
                # The parameters of a bucket have the same count, which each of them saves.
                value = tensors[full_name] = torch.zeros((), dtype=torch.float32)
                state[key] = value
            else:
                if key not in state:
                    state[key] = torch.zeros_like(part.parameter.detach())
                value = part.of(state[key])
                tensors[full_name] = as_dtensor(value, slices[name], mesh, part.is_sharded)
    generators = {}
    has_same_ranks = weights.manifest.body["written_by"]["ranks"] == mesh.world.size
    for device_type in ("cpu", "cuda"):
        name = _rng_name(device_type, mesh.world.rank)
        if has_same_ranks and name in saved and device_type in ("cpu", mesh.device.type):
            is_cpu = device_type == "cpu"
            now = torch.get_rng_state() if is_cpu else torch.cuda.get_rng_state(mesh.device)
            generators[device_type] = tensors[name] = torch.zeros_like(now, device="cpu")
    load_sharded(weights, tensors, axis)
    distiller.student.use_carried()
    masters.publish()

    # The settings are those of the configuration, which equals the saved one.
    (group,) = optimizer_settings(distiller.optimizer)
    group["params"] = list(range(len(parameters)))
    # The optimizer moves each tensor to the device that it needs.
    distiller.optimizer.load_state_dict({"state": moments, "param_groups": [group]})
    if "cpu" in generators:
        torch.set_rng_state(generators["cpu"])
    if "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], mesh.device)


def _check_optimizer(weights: ShardedWeights) -> None:
    saved_class = weights.manifest.training["optimizer"].get("class")
    if saved_class not in (None, OPTIMIZER_CLASS):
        raise UserError(
            f"checkpoint {weights.directory} was written with the optimizer {shown(saved_class)}, "
            "whose state this version cannot continue: finish the run with the version of "
            "megalard that began it, or choose another run.output"
        )


def _rng_name(device_type: str, rank: int) -> str:
    return f"rng.{device_type}.{rank:05d}"
