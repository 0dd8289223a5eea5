"""One step: micro-batches, loss, gradients, sums over ranks, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch.profiler import record_function

from megalard.config.schema import Config
from megalard.data.batch import Batch
from megalard.distill.objective import StreamObjective
from megalard.distill.student import Student
from megalard.errors import UserError
from megalard.model.decoder import Decoder
from megalard.parallel.agreement import gather_objects
from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import Mesh
from megalard.parallel.tensor.slices import kv_replicas
from megalard.training.activation_offload import ActivationOffload
from megalard.training.masters.masters import Masters
from megalard.training.optimizer import learning_rate, make_optimizer, update_where
from megalard.transfer import to_host


@dataclass(frozen=True)
class StepResult:
    """The means of a step over all its tokens.

    Attributes:
        loss: the loss.
        parts: the unweighted mean of each term, under names such as ``q``, or ``STREAM.q`` if there
            are several streams.
        gradient_norm: the global norm before clipping.
        learning_rate: the learning rate of the step.
        skipped: why there was no update; None if there was one.
        layers: by the names of ``parts``, the value of each layer: for the relations the mean KL
            of its rows and heads. None for a layer that the term does not read.
        gradient_norms: the norm before clipping of each kind of trained parameters.
    """

    loss: float
    parts: dict[str, float]
    gradient_norm: float
    learning_rate: float
    skipped: str | None
    layers: dict[str, list[float | None]] = field(default_factory=dict)
    gradient_norms: dict[str, float] = field(default_factory=dict)


class Distiller:
    """Teacher, student, the objectives of the streams, and the optimizer.

    Args:
        teacher: the frozen teacher; None if no stream compares with it.
        student: the student, which has the teacher's parameter objects where weights are equal.
        config: streams, optimizer and parallel settings.
        mesh: the axes of the run.
    """

    def __init__(self, teacher: Decoder | None, student: Student, config: Config, mesh: Mesh):
        self.teacher, self.student, self.config, self.mesh = teacher, student, config, mesh
        self.streams = config.all_streams()
        dtype = getattr(torch, config.model.compute_dtype)
        replicas = kv_replicas(student.decoder.spec, mesh.tp.size)
        self.objectives = {
            name: StreamObjective(
                stream,
                student.decoder,
                replicas,
                dtype,
                config.parallel.activation_checkpointing,
            )
            for name, stream in self.streams.items()
        }
        entries = {name: o.layer_entries for name, o in self.objectives.items()}
        self._layer_factors = {
            name: torch.tensor([float(entry.factor) for entry in group], device=mesh.device)
            for name, group in entries.items()
        }
        self._layer_terms = {
            name: torch.tensor([e.term for e in group], dtype=torch.int64, device=mesh.device)
            for name, group in entries.items()
        }
        if student.masters is None:
            student.masters = Masters(student, config.parallel, dtype, mesh, replicas)
        self.masters = cast(Masters, student.masters)
        self._offload = ActivationOffload(mesh.device) if config.parallel.offload else None
        self.optimizer = make_optimizer(
            self.masters.parameters, config.optimizer, self.masters.device
        )

    def step(self, batches: dict[str, list[Batch]], number: int) -> StepResult:
        """Take step ``number``, counted from 0; a collective call.

        Args:
            batches: this rank's micro-batches of each stream.

        Raises:
            UserError: the loss or a gradient is not finite, and run.non_finite is stop.
        """
        return self.update(*self.accumulate(batches, number), number)

    def accumulate(
        self, batches: dict[str, list[Batch]], number: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Run the forward and backward passes of all micro-batches, and add up their gradients.

        Returns:
            By stream: this rank's unweighted sums, fp32, as ``StreamObjective`` returns them; and
            the counts of the whole step that the terms are divided by, fp32 [terms].
        """
        self.masters.zero_gradients()
        counts = self._global_counts(batches)
        dropout, sums = self.student.dropout, {}
        for name, objective in self.objectives.items():
            scale = self.streams[name].weight / counts[name].clamp(min=1)
            dropout.seed = self.config.stream_seed(name) * 1_000_003 + number
            for batch in batches[name]:
                with self._saved_tensors():
                    loss, parts = objective(self.teacher, self.student.decoder, batch, scale)
                with record_function("backward"):
                    loss.backward()
                    self.masters.end_backward()
                sums[name] = sums[name] + parts if name in sums else parts
        return sums, counts

    def update(
        self, sums: dict[str, torch.Tensor], counts: dict[str, torch.Tensor], number: int
    ) -> StepResult:
        """Sum the gradients over ranks and update the weights, after ``accumulate``.

        Raises:
            UserError: as ``step``.
        """
        rate = learning_rate(number, self.config.optimizer)
        with record_function("optimizer"):
            is_finite_here = self.masters.reduce()
            norm = self.masters.norm()
            loss, parts = self._global_means(sums, counts)
            details = self._details(sums, counts)
            # The GPU decides on the update. It makes the update while the host waits for the
            # numbers and prepares the next step.
            numbers = to_host(torch.cat([torch.stack([*parts.values(), norm, loss]), details]))
            if self.config.optimizer.clip > 0:
                self.masters.clip(norm, self.config.optimizer.clip)
            self.masters.give_gradients()
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            update_where(torch.isfinite(norm) & torch.isfinite(loss), self.optimizer)
            self.masters.take_back_gradients()
            self.masters.publish()

        values = iter(numbers())
        part_values = {name: next(values) for name in parts}
        norm_value, loss_value = next(values), next(values)
        layers = self._by_layer(values)
        norms = {kind: next(values) for kind in self.masters.kinds}
        problem = None
        if not (math.isfinite(norm_value) and math.isfinite(loss_value)):
            problem = self._describe_non_finite(number, bool(is_finite_here), loss_value)
            if self.config.run.non_finite == "stop":
                self.masters.complete()  # no rank ends while another one waits for weights
                raise UserError(
                    f"{problem}: lower optimizer.learning_rate, or set run.non_finite skip"
                )
        return StepResult(loss_value, part_values, norm_value, rate, problem, layers, norms)

    def _global_counts(self, batches: dict[str, list[Batch]]) -> dict[str, torch.Tensor]:
        """Return the counts of the step, fp32 [terms] by stream; a collective call."""
        local = [
            torch.stack([objective.count(batch) for batch in batches[name]]).sum(0)
            for name, objective in self.objectives.items()
        ]
        flat = all_reduce(torch.cat(local), self.mesh.data)
        sizes = [len(counts) for counts in local]
        return dict(zip(self.objectives, flat.split(sizes), strict=True))

    def _global_means(
        self, sums: dict[str, torch.Tensor], counts: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of the step, and the mean of each term; a collective call."""
        flat = torch.cat([sums[name][: len(o.part_names)] for name, o in self.objectives.items()])
        all_reduce(all_reduce(flat, self.mesh.tp), self.mesh.data)
        loss, parts = flat.new_zeros(()), {}
        totals = iter(flat)
        for name, objective in self.objectives.items():
            prefix = self._prefix(name)
            for term, count in zip(objective.terms, counts[name], strict=True):
                for part, weight in term.weights.items():
                    mean = next(totals) / count.clamp(min=1)
                    parts[prefix + part] = mean
                    loss = loss + self.streams[name].weight * weight * mean
        return loss, parts

    def _prefix(self, stream: str) -> str:
        """Return what the names of a stream's parts begin with."""
        return f"{stream}." if len(self.objectives) > 1 else ""

    def _details(
        self, sums: dict[str, torch.Tensor], counts: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the values of all layers, and the norms of all kinds; a collective call.

        They have an all-reduce of their own, so that they cannot change the bits of the loss.
        """
        layers = [
            sums[name][len(objective.part_names) :]
            * self._layer_factors[name]
            / counts[name].clamp(min=1).index_select(0, self._layer_terms[name])
            for name, objective in self.objectives.items()
        ]
        details = torch.cat([*layers, self.masters.squares_by_kind()])
        all_reduce(details, self.mesh.world)
        details[len(details) - len(self.masters.kinds) :].sqrt_()
        return details

    def _by_layer(self, values: Iterator[float]) -> dict[str, list[float | None]]:
        """Return the values of the layers by the names of the parts; they are taken in order."""
        num_layers = self.student.decoder.spec.num_layers
        layers: dict[str, list[float | None]] = {}
        for name, objective in self.objectives.items():
            for entry in objective.layer_entries:
                part = self._prefix(name) + entry.part
                layers.setdefault(part, [None] * num_layers)[entry.layer] = next(values)
        return layers

    def _saved_tensors(self) -> AbstractContextManager:
        """Return the context that decides where autograd keeps tensors for the backward pass."""
        return nullcontext() if self._offload is None else self._offload.forward()

    def _describe_non_finite(self, number: int, is_finite_here: bool, loss: float) -> str:
        """Return a sentence that names the step, the ranks and the tensors; a collective call."""
        flags = gather_objects(is_finite_here, self.mesh.world)
        ranks = [rank for rank, is_finite in enumerate(flags) if not is_finite]
        local_names = [
            name
            for name, gradient in self.masters.local_gradients()
            if not torch.isfinite(gradient).all()
        ]
        names = sorted(
            {name for part in gather_objects(local_names[:4], self.mesh.world) for name in part}
        )
        if not ranks and not names:
            return f"step {number + 1}: the loss is {loss}, though every gradient is finite"
        return (
            f"step {number + 1}: the loss is {loss} and gradients are not finite on rank "
            f"{', '.join(map(str, ranks)) or 'none'}, in {', '.join(names[:4]) or 'no tensor'}"
            f"{' and others' if len(names) > 4 else ''}"
        )
