"""One optimizer step: micro-batches, loss, gradients, sums over ranks, clipping, update."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.autograd.graph import save_on_cpu
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
from megalard.parallel.tensor.layout import kv_replicas
from megalard.training.gradients import GradientBuffer
from megalard.training.optimizer import learning_rate, make_optimizer, update_where
from megalard.transfer import to_host


@dataclass(frozen=True)
class StepResult:
    """Global means of a step over all its tokens; ``gradient_norm`` is before clipping.

    ``parts`` are the unweighted means of each stream's terms: ``q``, or ``stream.q`` where there
    are several streams. ``skipped`` says why the update was left out; None if it was made.
    """

    loss: float
    parts: dict[str, float]
    gradient_norm: float
    learning_rate: float
    skipped: str | None


class Distiller:
    """Teacher, student, the streams' objectives and the optimizer, stepping together.

    Args:
        teacher: frozen decoder; None where no stream compares with it.
        student: shares the teacher's equal weights.
        config: streams, optimizer and parallel settings.
        mesh: the run's axes.
    """

    def __init__(self, teacher: Decoder | None, student: Student, config: Config, mesh: Mesh):
        self.teacher, self.student, self.config, self.mesh = teacher, student, config, mesh
        self.streams = config.all_streams()
        dtype = getattr(torch, config.model.compute_dtype)
        recompute = config.parallel.activation_checkpointing
        replicas = kv_replicas(student.decoder.spec, mesh.tp.size)
        self.objectives = {
            name: StreamObjective(stream, student.decoder, replicas, dtype, recompute)
            for name, stream in self.streams.items()
        }
        self.gradients = GradientBuffer(
            student.trained, student.decoder.layouts, mesh, mesh.replicas(replicas)
        )
        self.optimizer = make_optimizer(student.trained.values(), config.optimizer, mesh.device)

    def step(self, batches: dict[str, list[Batch]], number: int) -> StepResult:
        """Take optimizer step ``number`` (from 0) on this rank's micro-batches of each stream.

        Raises:
            UserError: the loss or a gradient is not finite and the run is to stop then.
        """
        return self.update(*self.accumulate(batches, number), number)

    def accumulate(
        self, batches: dict[str, list[Batch]], number: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Forward and backward over the micro-batches, into the zeroed gradient buffer.

        Returns:
            By stream, fp32 [terms], this rank's sums of the unweighted terms; and fp32
            [streams, 3], the counts of the whole step to divide them by (see
            ``distill.objective``).
        """
        self.gradients.zero()
        counts = torch.stack(
            [
                torch.stack([objective.count(batch) for batch in batches[name]]).sum(0)
                for name, objective in self.objectives.items()
            ]
        )
        all_reduce(counts, self.mesh.data)
        dropout, sums = self.student.dropout, {}
        for index, (name, objective) in enumerate(self.objectives.items()):
            scale = self.streams[name].weight / counts[index].clamp(min=1)
            dropout.seed = self.config.stream_seed(name) * 1_000_003 + number
            for batch in batches[name]:
                with self._saved_tensors():
                    loss, part = objective(self.teacher, self.student.decoder, batch, scale)
                with record_function("backward"):
                    loss.backward()
                sums[name] = sums[name] + part if name in sums else part
        return sums, counts

    def update(
        self, sums: dict[str, torch.Tensor], counts: torch.Tensor, number: int
    ) -> StepResult:
        """Sum the gradients over the ranks and take the step, after ``accumulate``.

        Raises:
            UserError: see ``step``.
        """
        rate = learning_rate(number, self.config.optimizer)
        with record_function("optimizer"):
            finite_here = torch.isfinite(self.gradients.flat.sum())
            self.gradients.reduce()
            norm = self.gradients.norm()
            loss, parts = self._global_means(sums, counts)
            # The GPU decides on the update, and makes it while the host waits for the numbers and
            # prepares the next step.
            numbers = to_host(torch.stack([*parts.values(), norm, loss]))
            if self.config.optimizer.clip > 0:
                self.gradients.clip(norm, self.config.optimizer.clip)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            update_where(torch.isfinite(norm) & torch.isfinite(loss), self.optimizer)

        *values, norm_value, loss_value = numbers()
        problem = None
        if not (math.isfinite(norm_value) and math.isfinite(loss_value)):
            problem = self._describe_non_finite(number, bool(finite_here), loss_value)
            if self.config.run.non_finite == "stop":
                raise UserError(
                    f"{problem}: lower optimizer.learning_rate, or set run.non_finite skip"
                )
        return StepResult(
            loss_value, dict(zip(parts, values, strict=True)), norm_value, rate, problem
        )

    def _saved_tensors(self):
        """Where autograd keeps what the backward pass needs."""
        if self.config.parallel.offload:
            return save_on_cpu(pin_memory=self.mesh.device.type == "cuda")
        return nullcontext()

    def _global_means(
        self, sums: dict[str, torch.Tensor], counts: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The step's loss, and its terms; a collective call."""
        flat = torch.cat(list(sums.values()))
        all_reduce(all_reduce(flat, self.mesh.tp), self.mesh.data)
        loss, parts = flat.new_zeros(()), {}
        totals = iter(flat)
        for index, (name, objective) in enumerate(self.objectives.items()):
            prefix = f"{name}." if len(self.objectives) > 1 else ""
            for term, weight in objective.weights.items():
                mean = next(totals) / counts[index, objective.counts[term]].clamp(min=1)
                parts[prefix + term] = mean
                loss = loss + self.streams[name].weight * weight * mean
        return loss, parts

    def _describe_non_finite(self, number: int, finite_here: bool, loss: float) -> str:
        """The step, the ranks and the tensors; a collective call."""
        flags = gather_objects(finite_here, self.mesh.world)
        ranks = [rank for rank, finite in enumerate(flags) if not finite]
        names = [
            name
            for name, parameter in self.student.trained.items()
            if not torch.isfinite(parameter.grad).all()
        ]
        found = sorted(
            {name for part in gather_objects(names[:4], self.mesh.world) for name in part}
        )
        if not ranks and not found:
            return f"step {number + 1}: the loss is {loss}, though every gradient is finite"
        return (
            f"step {number + 1}: the loss is {loss} and gradients are not finite on rank "
            f"{', '.join(map(str, ranks)) or 'none'}, in {', '.join(found[:4]) or 'no tensor'}"
            f"{' and others' if len(found) > 4 else ''}"
        )
