"""Progress of a run on rank 0: the console, ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path

import torch

from megalard.reporter import Reporter
from megalard.training.step import StepResult


class Monitor:
    """Reports steps. On ranks other than rank 0 it does nothing.

    Args:
        output: the output directory of the run.
        steps: the number of steps of the run, for the estimated time.
        tokens_per_step: tokens of one step over all ranks.
        ranks: the number of ranks, for the rate per GPU.
        log_every: steps between reports.
        reporter: prints on rank 0.
        device: the device whose peak memory is reported.
        steps_done: the steps taken before this start. Reports of later steps are removed.
        ideal_seconds: the time of a step at the peak rate of the GPUs, for the model FLOP
            utilization (MFU); None if that is not known.
    """

    def __init__(
        self,
        output: Path,
        steps: int,
        tokens_per_step: int,
        ranks: int,
        log_every: int,
        reporter: Reporter,
        device: torch.device,
        steps_done: int = 0,
        ideal_seconds: float | None = None,
    ):
        self.steps, self.tokens_per_step, self.log_every = steps, tokens_per_step, log_every
        self.ranks, self.reporter, self.device = ranks, reporter, device
        self.ideal_seconds = ideal_seconds
        self.last_time, self.last_step = time.perf_counter(), steps_done
        if reporter.is_rank_0:
            from torch.utils.tensorboard import SummaryWriter

            path = output / "metrics.jsonl"
            _drop_after(path, steps_done)
            self.metrics = open(path, "a", buffering=1)  # noqa: SIM115 (closed by close)
            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=steps_done + 1)

    def report(self, number: int, result: StepResult) -> None:
        """Report step ``number``, counted from 1, if a report is due."""
        is_due = number % self.log_every == 0 or number == self.steps or result.skipped is not None
        if not self.reporter.is_rank_0 or not is_due:
            return
        now = time.perf_counter()
        seconds = (now - self.last_time) / max(1, number - self.last_step)
        self.last_time, self.last_step = now, number
        values = {
            "loss": result.loss,
            **{f"loss_{name}": value for name, value in result.parts.items()},
            "gradient_norm": result.gradient_norm,
            "learning_rate": result.learning_rate,
            "tokens_per_second": self.tokens_per_step / seconds,
            "memory_gib": peak_memory_bytes(self.device) / 2**30,
        }
        if self.ideal_seconds is not None:
            values["mfu"] = self.ideal_seconds / seconds
        tokens = number * self.tokens_per_step
        # JSON has no NaN.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": number, "tokens": tokens, **finite, "skipped": result.skipped}
        self.metrics.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, number)
        parts = " ".join(f"{name} {value:.4f}" for name, value in result.parts.items())
        rate = values["tokens_per_second"]
        per_rank = f" ({rate / self.ranks:,.0f} per rank)" if self.ranks > 1 else ""
        mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        self.reporter.line(
            f"step {number}/{self.steps}  loss {result.loss:.4f} ({parts})  "
            f"grad {result.gradient_norm:.3g}  lr {result.learning_rate:.3g}  "
            f"{rate:,.0f} tokens/s{per_rank}{mfu}  {values['memory_gib']:.2f} GiB  "
            f"ETA {_duration((self.steps - number) * seconds)}"
        )
        if result.skipped is not None:
            self.reporter.line(f"skipped {result.skipped}")

    def close(self) -> None:
        """Close the files."""
        if self.reporter.is_rank_0:
            self.metrics.close()
            self.board.close()


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to ``step``; later steps are taken again."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break  # a killed process may leave half a line at the end
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
