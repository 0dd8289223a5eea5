"""The fp32 masters of a student, their gradients, and what the optimizer and checkpoints see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megalard.config.schema import ParallelConfig
from megalard.distill.student import Student
from megalard.model.names import KINDS, kind_of
from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Axis, Mesh
from megalard.training.masters.bucket import Bucket
from megalard.training.masters.plain import PlainMasters
from megalard.training.masters.sharded import ShardedMasters


@dataclass(frozen=True)
class MasterPart:
    """What this rank holds of the master of one trained parameter.

    Attributes:
        value: fp32, the rank's slice of the parameter, or some rows of that slice.
        parameter: the parameter of the optimizer that has it.
        bucket, number: the bucket and its place there; None and 0 if the parameter is the master.
    """

    value: torch.Tensor
    parameter: nn.Parameter
    bucket: Bucket | None = None
    number: int = 0

    @property
    def is_sharded(self) -> bool:
        """Whether ``value`` is divided over the ranks that hold the parameter."""
        return self.bucket is not None

    def of(self, state: torch.Tensor) -> torch.Tensor:
        """Return the elements of this part in a tensor of the optimizer's state, as a view."""
        return state if self.bucket is None else self.bucket.view(state, self.number)


class Masters:
    """fp32 weights of everything that is trained, and its gradients.

    A parameter that several ranks hold gets only a part of its gradient on each of them. The ranks
    of dp and cp read different tokens. Of the tp ranks, norm weights and the A of column-parallel
    LoRA pairs see a share of the tokens, and replicated K/V heads see a share of the query heads.
    The gradient is therefore summed over all ranks that hold the parameter.

    With ``parallel.shard_optimizer`` these ranks divide masters, gradients and optimizer state
    among them. Otherwise, and for parameters that one rank holds alone, the decoder's parameters
    are the masters.

    Attributes:
        parts: by the name of the trained parameter, what this rank holds of it.
        kinds: the kinds of parameters that are trained, in the order of ``KINDS``.

    Args:
        student: the student. Its parameters get the compute dtype where they are not the masters.
        config: what is divided and where it is kept.
        dtype: the compute dtype.
        mesh: the axes of the run.
        kv_replicas: the number of tp ranks that hold the same K/V heads.
    """

    def __init__(
        self,
        student: Student,
        config: ParallelConfig,
        dtype: torch.dtype,
        mesh: Mesh,
        kv_replicas: int,
    ):
        self.mesh = mesh
        holders = {count: mesh.holders(count) for count in sorted({1, kv_replicas, mesh.tp.size})}
        self._is_offloaded = config.offload_optimizer
        plain: dict[int, list[nn.Parameter]] = {}
        sharded: list[tuple[nn.Parameter, Axis]] = []
        for name, parameter in student.trained.items():
            replicas = student.decoder.slices[name].replicas
            axis = holders[replicas]
            if self._is_offloaded or (config.shard_optimizer and axis.size > 1):
                sharded.append((parameter, axis))
            else:
                plain.setdefault(replicas, []).append(parameter)
        self._plain = PlainMasters(dict(sorted(plain.items())), holders, mesh.device)
        self._sharded = ShardedMasters(
            sharded, dtype, getattr(torch, config.gradient_dtype), self._is_offloaded
        )
        places = {
            parameter: (bucket, number)
            for bucket in self._sharded.buckets
            for number, parameter in enumerate(bucket.parameters)
        }
        student.decoder.weight_sources.append(self._sharded.publication)
        self.parts: dict[str, MasterPart] = {}
        for name, parameter in student.trained.items():
            if parameter in places:
                bucket, number = places[parameter]
                value = bucket.view(bucket.master.detach(), number)
                self.parts[name] = MasterPart(value, bucket.master, bucket, number)
            else:
                self.parts[name] = MasterPart(parameter.detach(), parameter)
        self.kinds = [kind for kind in KINDS if any(kind_of(n) == kind for n in self.parts)]
        self._shares_of_kinds = self._shares(student).to(mesh.device)

    def _shares(self, student: Student) -> torch.Tensor:
        """Return [kinds, parts]: the share of each part's square that this rank contributes.

        It is zero for the other kinds. Ranks that hold the same gradient contribute equal shares.
        """
        shares = []
        for name, part in self.parts.items():
            if part.value.numel():
                copies = student.decoder.slices[name].replicas * self.mesh.data.size
                share = 1.0 if part.is_sharded else 1.0 / copies
                shares.append([share * (kind_of(name) == kind) for kind in self.kinds])
        return torch.tensor(shares).view(-1, len(self.kinds)).T

    @property
    def device(self) -> torch.device:
        """The device of the masters."""
        return torch.device("cpu") if self._is_offloaded else self.mesh.device

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the optimizer."""
        return [*self._plain.parameters, *(bucket.master for bucket in self._sharded.buckets)]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The flat tensors of this rank's gradients."""
        return [self._plain.gradient, *(bucket.gradient for bucket in self._sharded.buckets)]

    def zero_gradients(self) -> None:
        """Set every gradient to zero."""
        for gradient in self.gradients:
            gradient.zero_()

    def end_backward(self) -> None:
        """Send the gradients of a micro-batch that are still to be sent; a collective call."""
        self._sharded.end_backward()

    def reduce(self) -> torch.Tensor:
        """Sum every gradient over the ranks that computed a part of it; a collective call.

        The decoder has complete weights afterwards, so that masters can be updated.

        Returns:
            A bool scalar: whether the gradients that this rank computed are finite.
        """
        self.complete()
        total = self._plain.gradient.sum()
        if self._sharded.buckets:
            total = total + self._sharded.reduce()
        self._plain.reduce()
        return torch.isfinite(total)

    def norm(self) -> torch.Tensor:
        """Return the global L2 norm of the reduced gradient, an fp32 scalar; a collective call.

        Each parameter counts once, however many ranks hold it.
        """
        square = all_reduce(self._plain.square(), self.mesh.tp)
        if self._sharded.buckets:
            square = square + all_reduce(self._sharded.square(), self.mesh.world)
        return square.sqrt()

    def squares_by_kind(self) -> torch.Tensor:
        """Return the squared L2 norms of the reduced gradients of each of ``kinds``, fp32 [kinds].

        The sum over all ranks counts every parameter once.
        """
        local = [gradient for _, gradient in self.local_gradients() if gradient.numel()]
        if not local:
            return torch.zeros(len(self.kinds), device=self.mesh.device)
        norms = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float32))
        return (norms.square() * self._shares_of_kinds).sum(1)

    def clip(self, norm: torch.Tensor, largest: float) -> None:
        """Scale the gradient down to the norm ``largest`` if its norm is larger and finite."""
        factor = (largest / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0)
        for gradient in self.gradients:
            gradient.mul_(factor)

    def give_gradients(self) -> None:
        """Let the parameters of the optimizer have the reduced gradient."""
        for bucket in self._sharded.buckets:
            bucket.give_gradient()

    def take_back_gradients(self) -> None:
        """Free the copies that ``give_gradients`` made for the update."""
        for bucket in self._sharded.buckets:
            bucket.take_back_gradient()

    def publish(self) -> None:
        """Begin to give the decoder the values of the masters; a collective call.

        The decoder's parameters are complete when the decoder uses them, or after ``complete``.
        """
        self._sharded.publication.start()

    def complete(self) -> None:
        """Complete the decoder's parameters for what reads them elsewhere; a collective call."""
        self._sharded.publication.complete()

    def value(self, name: str) -> torch.Tensor:
        """Return the master of a parameter, fp32, this tp rank's slice; a collective call."""
        part = self.parts[name]
        if part.bucket is None:
            return part.value
        return part.bucket.full(part.bucket.master, part.number)

    def gradient(self, name: str) -> torch.Tensor:
        """Return the reduced gradient of a parameter, this tp rank's slice; a collective call."""
        part = self.parts[name]
        if part.bucket is None:
            return part.parameter.grad
        return part.bucket.full(part.bucket.gradient, part.number)

    def local_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what this rank holds of each gradient, by the name of the parameter."""
        for name, part in self.parts.items():
            if part.bucket is None:
                yield name, part.parameter.grad
            else:
                yield name, part.of(part.bucket.gradient)
