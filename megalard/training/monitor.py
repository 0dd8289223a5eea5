"""Progress of a run on rank 0: the console, ``metrics.jsonl`` and trackers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megalard.files.reading import check_regular
from megalard.files.writing import cannot_write, replace_text
from megalard.reporter import Reporter
from megalard.training.step import StepResult
from megalard.training.trackers import open_trackers
from megalard.training.validator import Validation

if TYPE_CHECKING:
    from megalard.training.board import Board


@dataclass(frozen=True)
class Pace:
    """What the steps of a stage cost, for rates and the estimated time.

    Attributes:
        stage: the name of the stage; None in a run without stages.
        last_step: the number of its last step, counted from 1 over all stages.
        tokens_per_step: tokens of one step over all ranks.
        flops_per_step: the operations of one step over all ranks.
    """

    stage: str | None
    last_step: int
    tokens_per_step: int
    flops_per_step: float


class Monitor:
    """Reports steps. On ranks other than rank 0 it does nothing.

    Args:
        output: the output directory of the run.
        paces: the stages of the run, in order.
        ranks: the number of ranks, for the rate per GPU.
        log_every: steps between reports.
        reporter: prints on rank 0.
        device: the device whose peak memory is reported.
        steps_done: the steps taken before this start. Reports of later steps are removed.
        peak_flops: the peak FLOP/s of a GPU, for the model FLOP utilization (MFU); None if that is
            not known.
        trackers: what else gets the values; see ``run.trackers``.
        settings: the configuration of the run, for the trackers.

    Attributes:
        validation: the newest validation, which the progress lines repeat; None without one.
    """

    validation: Validation | None = None
    board: Board | None = None

    def __init__(
        self,
        output: Path,
        paces: Sequence[Pace],
        ranks: int,
        log_every: int,
        reporter: Reporter,
        device: torch.device,
        steps_done: int = 0,
        peak_flops: float | None = None,
        trackers: Sequence[str] = ("tensorboard",),
        settings: dict | None = None,
    ):
        self.paces, self.steps, self.log_every = paces, paces[-1].last_step, log_every
        self.ranks, self.reporter, self.device = ranks, reporter, device
        self.peak_flops = peak_flops
        self.last_time, self.last_step = time.perf_counter(), steps_done
        if reporter.is_rank_0:
            path = output / "metrics.jsonl"
            try:
                _drop_after(path, steps_done)
                self.metrics = open(path, "a", buffering=1)  # noqa: SIM115 (closed by close)
                self.trackers = open_trackers(trackers, output, settings or {}, reporter)
                if "tensorboard" in trackers:
                    from megalard.training.board import Board  # slow to import

                    self.board = Board(output / "tensorboard", steps_done + 1)
                    self.trackers.append(self.board)
            except OSError as error:
                raise cannot_write(output, error) from None

    def restart_clock(self, step: int) -> None:
        """Start timing anew, because the time since the last report was not spent on steps."""
        self.last_time, self.last_step = time.perf_counter(), step

    def report(self, number: int, result: StepResult) -> None:
        """Report step ``number``, counted from 1 over all stages, if a report is due."""
        pace = self._pace(number)
        is_last = number in (pace.last_step, self.steps)
        is_due = number % self.log_every == 0 or is_last or result.skipped is not None
        if not self.reporter.is_rank_0 or not is_due:
            return
        now = time.perf_counter()
        seconds = (now - self.last_time) / max(1, number - self.last_step)
        self.last_time, self.last_step = now, number
        values = {
            "loss": result.loss,
            **{f"loss_{name}": value for name, value in result.parts.items()},
            "gradient_norm": result.gradient_norm,
            **{f"gradient_norm_{kind}": x for kind, x in result.gradient_norms.items()},
            "learning_rate": result.learning_rate,
            "tokens_per_second": pace.tokens_per_step / seconds,
            "memory_gib": peak_memory_bytes(self.device) / 2**30,
        }
        if self.peak_flops is not None:
            values["mfu"] = pace.flops_per_step / (seconds * self.peak_flops * self.ranks)
        layers = {part: [_rounded(x) for x in row] for part, row in result.layers.items()}
        self._write(
            number, values, **({"layers": layers} if layers else {}), skipped=result.skipped
        )
        self._track(values, number)
        self.reporter.line(self._line(number, result, values, pace, seconds))
        if result.skipped is not None:
            self.reporter.line(f"skipped {result.skipped}")

    def report_validation(self, validation: Validation) -> None:
        """Report a validation, and start timing anew."""
        self.validation, number = validation, validation.step
        if self.reporter.is_rank_0:
            values = validation.values()
            self._write(number, values)
            self._track(values, number)
            self.reporter.line(f"step {number}/{self.steps}  validation: {validation.line()}")
        self.restart_clock(number)

    def _write(self, number: int, values: Mapping[str, float], **others: object) -> None:
        """Write one line of ``metrics.jsonl``."""
        pace = self._pace(number)
        # JSON has no NaN.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {
            "step": number,
            **({} if pace.stage is None else {"stage": pace.stage}),
            "tokens": self._total(number, lambda pace: pace.tokens_per_step),
            **finite,
            **others,
        }
        self.metrics.write(json.dumps(line) + "\n")

    def _track(self, values: Mapping[str, float], number: int) -> None:
        for tracker in self.trackers:
            tracker.add(values, number)

    def _pace(self, number: int) -> Pace:
        return next(pace for pace in self.paces if number <= pace.last_step)

    def _line(
        self, number: int, result: StepResult, values: dict[str, float], pace: Pace, seconds: float
    ) -> str:
        parts = " ".join(f"{name} {value:.4f}" for name, value in result.parts.items())
        rate = values["tokens_per_second"]
        per_rank = f" ({rate / self.ranks:,.0f} per rank)" if self.ranks > 1 else ""
        mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        gap = self.validation.gap_restored if self.validation else None
        restored = "" if gap is None else f"gap restored {gap:.3f}  "
        stage = "" if pace.stage is None else f"{pace.stage} "
        # The steps of other stages are expected to run at the present operations per second.
        all_flops = self._total(self.steps, lambda pace: pace.flops_per_step)
        flops_done = self._total(number, lambda pace: pace.flops_per_step)
        remaining = (all_flops - flops_done) / pace.flops_per_step * seconds
        return (
            f"{stage}step {number}/{self.steps}  loss {result.loss:.4f} ({parts})  "
            f"grad {result.gradient_norm:.3g}  lr {result.learning_rate:.3g}  "
            f"{restored}{rate:,.0f} tokens/s{per_rank}{mfu}  {values['memory_gib']:.2f} GiB  "
            f"ETA {_duration(remaining)}"
        )

    def _total(self, number: int, per_step: Callable[[Pace], float]) -> float:
        """Return the sum of ``per_step`` over the steps 1 to ``number``."""
        total: float = 0
        before = 0
        for pace in self.paces:
            total += (min(max(number, before), pace.last_step) - before) * per_step(pace)
            before = pace.last_step
        return total

    def close(self) -> None:
        """Close the files."""
        if self.reporter.is_rank_0:
            self.metrics.close()
            for tracker in self.trackers:
                tracker.close()


def _rounded(value: float | None) -> float | None:
    """Return six digits of a number, which has a short text; None if it is not finite."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to ``step``; later steps are taken again.

    A line that cannot be read is dropped: a killed process may leave half a line.
    """
    if not os.path.lexists(path):
        return
    check_regular(path)
    lines = []
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                text = line.decode()
                if json.loads(text)["step"] <= step and text.endswith("\n"):
                    lines.append(text)
    replace_text(path, "".join(lines))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
