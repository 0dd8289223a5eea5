"""Evaluation around a training run: teacher, scaled student, restored student."""

from __future__ import annotations

from pathlib import Path

import torch

from megalard.config.schema import Config
from megalard.evaluation.measure import Measurement, choose_windows, default_lengths, measure
from megalard.evaluation.report import ModelResult, plot, print_table, write_json
from megalard.model.decoder import Decoder
from megalard.parallel.agreement import checked_on_all_ranks
from megalard.parallel.mesh import Mesh
from megalard.training.assemble import Plan, open_tokens


class Evaluator:
    """Measures before and after training; does nothing when there is no held-out text.

    Raises:
        UserError: on every rank, when the text or the lengths cannot be used.
    """

    def __init__(self, config: Config, plan: Plan, output: Path, mesh: Mesh):
        self.plan, self.output, self.mesh = plan, output, mesh
        self.dtype = getattr(torch, config.model.compute_dtype)
        self.results: list[ModelResult] = []
        self.windows = {}
        evaluation = config.evaluation
        if not evaluation.paths:
            return
        store = open_tokens(
            evaluation.paths, output / "evaluation-tokens", config.data.text_key, plan, mesh
        )
        lengths = evaluation.lengths or default_lengths(plan.native_context, plan.factor)
        with checked_on_all_ranks(mesh.world):
            self.windows = choose_windows(
                store, lengths, evaluation.max_tokens, mesh.tp.size, mesh.cp.size
            )

    def before(self, teacher: Decoder, student: Decoder) -> None:
        """Measure the teacher and the scaled student."""
        if self.windows:
            self.results.append(ModelResult("teacher", 0, self._measure(teacher, None)))
            self.results.append(ModelResult("scaled", 0, self._measure(student, teacher)))

    def after(self, teacher: Decoder, student: Decoder, tokens: int) -> None:
        """Measure the restored student; rank 0 prints the table and writes JSON and PNG."""
        if not self.windows:
            return
        self.results.append(ModelResult("restored", tokens, self._measure(student, teacher)))
        if self.mesh.world.rank == 0:
            native = self.plan.native_context
            print_table(self.results, native)
            write_json(self.output / "evaluation.json", self.results, native, self.plan.factor)
            plot(self.output / "evaluation.png", self.results, native)

    def _measure(self, model: Decoder, teacher: Decoder | None) -> dict[int, Measurement]:
        native = self.plan.native_context
        return {
            length: measure(
                model, windows, self.mesh, self.dtype, teacher if length <= native else None
            )
            for length, windows in self.windows.items()
        }
