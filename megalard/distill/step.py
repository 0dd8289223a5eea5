"""One optimizer step: micro-batches, loss, gradients, sums over ranks, clipping, update."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.autograd.graph import save_on_cpu

from megalard.config import Config
from megalard.data.batch import Batch
from megalard.distill.lockstep import Residuals, lockstep
from megalard.distill.logits import chosen_rows, logits_kl_sum
from megalard.distill.relation import RelationObjective
from megalard.distill.sharded_relation import RelationPlan
from megalard.distill.student import Student, last_layer_needed
from megalard.errors import UserError
from megalard.model.decoder import Decoder
from megalard.optimizer import learning_rate, make_optimizer
from megalard.parallel.agreement import gather_objects
from megalard.parallel.collectives import all_reduce
from megalard.parallel.gradients import GradientBuffer
from megalard.parallel.layout import kv_replicas
from megalard.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepResult:
    """Global means of a step over all its valid tokens; ``gradient_norm`` is before clipping.

    ``skipped`` says why the update was left out; None if it was made.
    """

    loss: float
    parts: dict[str, float]
    gradient_norm: float
    learning_rate: float
    skipped: str | None


class Distiller:
    """Teacher, student, objective and optimizer, stepping together.

    Args:
        teacher: frozen decoder.
        student: shares the teacher's equal weights.
        config: objective, optimizer and parallel settings.
        mesh: the run's axes.
    """

    def __init__(self, teacher: Decoder, student: Student, config: Config, mesh: Mesh):
        self.teacher, self.student, self.config, self.mesh = teacher, student, config, mesh
        spec = teacher.spec
        self.dtype = getattr(torch, config.model.compute_dtype)
        self.last_layer = last_layer_needed(config, spec.num_layers)
        self.layers = set(config.objective.layers or range(spec.num_layers))
        weights = config.active_relations()
        replicas = kv_replicas(spec, mesh.tp.size)
        self.relations = (
            RelationObjective(spec, weights, len(self.layers), replicas) if weights else None
        )
        self.gradients = GradientBuffer(
            student.trained, student.decoder.layouts, mesh, mesh.replicas(replicas)
        )
        self.optimizer = make_optimizer(student.trained.values(), config.optimizer, mesh.device)

    def step(self, batches: list[Batch], number: int) -> StepResult:
        """Take optimizer step ``number`` (from 0) on this rank's micro-batches.

        Raises:
            UserError: the loss or a gradient is not finite and the run is to stop then.
        """
        self.gradients.zero()
        sums, counts = self.accumulate(batches, number)
        finite_here = torch.isfinite(self.gradients.flat.sum())
        self.gradients.reduce()
        norm = self.gradients.norm()
        rate = learning_rate(number, self.config.optimizer)
        parts = self._global_means(sums, counts)
        loss = sum(self._weight(name) * value for name, value in parts.items())
        *values, norm_value, loss_value = torch.stack([*parts.values(), norm, loss]).tolist()

        finite = abs(norm_value) < float("inf") and abs(loss_value) < float("inf")
        problem = None
        if not finite:
            problem = self._describe_non_finite(number, bool(finite_here), loss_value)
            if self.config.run.non_finite == "stop":
                raise UserError(
                    f"{problem}: lower optimizer.learning_rate, or set run.non_finite skip"
                )
        if finite:
            if self.config.optimizer.clip > 0:
                self.gradients.clip(norm, self.config.optimizer.clip)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        return StepResult(
            loss_value, dict(zip(parts, values, strict=True)), norm_value, rate, problem
        )

    def accumulate(self, batches: list[Batch], number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward over the micro-batches, into the gradient buffer.

        Returns:
            [relations + 1] unweighted sums of this rank (the logits KL last) and [2] counts over
            the whole step: valid tokens, and tokens of the logits KL.
        """
        objective = self.config.objective
        with_logits = objective.logits_kl > 0
        rows = [chosen_rows(b, objective.logits_positions) if with_logits else [] for b in batches]
        counts = torch.tensor(
            [sum(b.valid_tokens for b in batches), sum(map(len, rows))],
            dtype=torch.float32,
            device=self.mesh.device,
        )
        all_reduce(counts, self.mesh.data)
        scale = 1.0 / counts.clamp(min=1)
        sums = None
        for batch, chosen in zip(batches, rows, strict=True):
            self.student.dropout.seed = self.config.run.seed * 1_000_003 + number
            self.student.dropout.token_t = batch.token_ids()
            with self._saved_tensors():
                loss, part = self._micro_step(batch, chosen, scale)
            loss.backward()
            sums = part if sums is None else sums + part
        self.student.dropout.token_t = None
        return sums, counts

    def _micro_step(self, batch: Batch, rows: list[int], scale: torch.Tensor):
        plan = RelationPlan(batch.shard, batch.doc_start_bn, batch.doc_end_bn)
        residuals = Residuals() if self.config.objective.logits_kl > 0 else None
        loss = scale.new_zeros(())
        parts = scale.new_zeros(len(self.relations.names) if self.relations else 0)
        for pair in lockstep(
            self.teacher,
            self.student.decoder,
            batch,
            self.dtype,
            self.last_layer,
            residuals,
            self.config.parallel.activation_checkpointing,
        ):
            if self.relations is None or pair.layer not in self.layers:
                continue
            layer_loss, layer_parts = self.relations(pair.student, pair.teacher, plan)
            loss = loss + layer_loss * scale[0]
            parts = parts + layer_parts
        logits = scale.new_zeros(())
        if residuals is not None:
            kl = logits_kl_sum(self.teacher, self.student.decoder, residuals, rows)
            loss = loss + self.config.objective.logits_kl * kl * scale[1]
            # every tp rank has the whole sum; each reports its share of it
            logits = kl.detach() / self.mesh.tp.size
        return loss, torch.cat([parts, logits[None]])

    def _saved_tensors(self):
        """Where autograd keeps what the backward pass needs."""
        if self.config.parallel.offload:
            return save_on_cpu(pin_memory=self.mesh.device.type == "cuda")
        return nullcontext()

    def _global_means(self, sums: torch.Tensor, counts: torch.Tensor) -> dict[str, torch.Tensor]:
        all_reduce(all_reduce(sums, self.mesh.tp), self.mesh.data)
        names = self.relations.names if self.relations else []
        means = {name: sums[i] / counts[0] for i, name in enumerate(names)}
        if self.config.objective.logits_kl > 0:
            means["logits"] = sums[-1] / counts[1]
        return means

    def _weight(self, name: str) -> float:
        objective = self.config.objective
        return objective.logits_kl if name == "logits" else getattr(objective.relations, name)

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
