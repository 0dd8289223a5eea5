"""Evaluation around a run: the teacher, the scaled student, and the restored student."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from megalard.config.schema import Config, EvaluationConfig
from megalard.errors import UserError
from megalard.evaluation.measure import check_lengths, cut_windows, default_lengths, length_multiple
from megalard.evaluation.plots import draw
from megalard.evaluation.report import Entry, Restoration, print_tables, read_json, write_json
from megalard.evaluation.suite import Suite, run_suite
from megalard.model.decoder import Decoder
from megalard.parallel.agreement import checked_on_all_ranks
from megalard.parallel.mesh import Mesh
from megalard.training.holdout import HeldOut
from megalard.training.plan import Plan
from megalard.training.streams import open_tokens


class Evaluator:
    """Measures before and after training. Without any text to measure on it does nothing.

    Args:
        held_out: a part of the training text that was taken aside; it is used if the
            configuration names no held-out text.
        is_resumed: as for ``open_streams``.

    Attributes:
        entries: what has been measured so far.
        restoration: how the entries are compared.

    Raises:
        UserError: on every rank, if the text or the lengths cannot be used.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        output: Path,
        mesh: Mesh,
        held_out: HeldOut | None = None,
        is_resumed: bool = False,
    ):
        self.output, self.mesh = output, mesh
        self.dtype = getattr(torch, config.model.compute_dtype)
        self.restoration = Restoration(plan.native_window, plan.factor)
        self.entries: list[Entry] = []
        self.suite = Suite()
        evaluation = config.evaluation
        self.settings = {"text": evaluation.paths, "max_tokens": evaluation.max_tokens}
        if not evaluation.paths:
            if held_out is not None:
                self._use_training_text(held_out, evaluation, plan)
            return
        directory = output / "evaluation-tokens"
        store = open_tokens(evaluation.paths, directory, config.data, plan, mesh, is_resumed)
        lengths = evaluation.lengths or default_lengths(plan.native_window, plan.factor)
        with checked_on_all_ranks(mesh.world):
            check_lengths(lengths, mesh.cp.size, "evaluation.lengths")
            count = min(len(store.tokens), max(evaluation.max_tokens, *lengths))
            start = store.boundaries.before
            windows = cut_windows(store.read(0, count), lengths, evaluation.max_tokens, start)
        self.suite = Suite(windows)

    def _use_training_text(
        self, held_out: HeldOut, evaluation: EvaluationConfig, plan: Plan
    ) -> None:
        """Evaluate on a part of the training text, at the lengths that it is long enough for."""
        mesh, tokens = self.mesh, held_out.tokens
        self.settings = {"training_tokens_held_out": len(tokens)}
        multiple = length_multiple(mesh.cp.size)
        lengths = [
            length
            for length in evaluation.lengths or default_lengths(plan.native_window, plan.factor)
            if length <= len(tokens) and length % multiple == 0
        ]
        if lengths:
            start = held_out.boundaries.before
            self.suite = Suite(cut_windows(tokens, lengths, evaluation.max_tokens, start))

    @property
    def is_active(self) -> bool:
        """Whether there is held-out text."""
        return bool(self.suite.windows)

    def before(self, teacher: Decoder, student: Decoder) -> None:
        """Measure the teacher and the scaled student; a collective call."""
        if self.is_active:
            self._measure("teacher", teacher, None)
            self._measure("scaled", student, teacher)

    def between(self, name: str, teacher: Decoder | None, student: Decoder, tokens: int) -> None:
        """Measure the student between two stages; a collective call.

        Args:
            name: the name of the measurement in the tables.
            teacher: None if it is not in memory; then nothing is compared with it.
            tokens: the number of tokens so far.
        """
        if self.is_active:
            self._measure(name, student, teacher, tokens)
            if self.mesh.is_rank_0:
                self._write()

    def resume(self, names: Sequence[str]) -> None:
        """Take over what was measured between stages before the run was stopped.

        Args:
            names: the names of these measurements in the tables.
        """
        if self.is_active and self.mesh.is_rank_0 and names:
            # Only these rows are lost if the file is missing or damaged, or has other lengths.
            with contextlib.suppress(OSError, UserError):
                entries, _ = read_json(self._path)
                self.entries += [
                    entry
                    for entry in entries
                    if entry.name in names
                    and entry.results.by_length.keys() == self.suite.windows.keys()
                ]

    def after(self, teacher: Decoder, student: Decoder, tokens: int) -> None:
        """Measure the restored student; rank 0 prints the table and writes JSON and PNG.

        Args:
            tokens: the number of tokens that the student was restored with.
        """
        if not self.is_active:
            return
        self._measure("restored", student, teacher, tokens)
        if self.mesh.is_rank_0:
            print_tables(self.entries, self.restoration)
            self._write()
            draw(self._path.with_suffix(".png"), self.entries, self.restoration)

    @property
    def _path(self) -> Path:
        return self.output / "evaluation.json"

    def _write(self) -> None:
        write_json(self._path, self.entries, self.settings, self.restoration)

    def _measure(self, name: str, model: Decoder, teacher: Decoder | None, tokens: int = 0) -> None:
        native = self.restoration.native_window
        results = run_suite(model, self.suite, self.mesh, self.dtype, teacher, native)
        self.entries.append(Entry(name, results, tokens, model.spec.max_positions))
