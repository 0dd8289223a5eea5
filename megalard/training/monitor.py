"""Progress of a run, on rank 0: the console, ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path

import torch

from megalard.training.step import StepResult


class Monitor:
    """Reports steps; on other ranks than 0 it does nothing.

    Args:
        output: the run's directory.
        steps: of the whole run, for the ETA.
        tokens_a_step: over all ranks.
        log_every: steps between reports.
        active: whether this is rank 0.
        done: steps taken before this start; what was reported of later ones is dropped.
    """

    def __init__(
        self,
        output: Path,
        steps: int,
        tokens_a_step: int,
        log_every: int,
        active: bool,
        done: int = 0,
    ):
        self.steps, self.tokens_a_step, self.log_every = steps, tokens_a_step, log_every
        self.active = active
        self.last_time, self.last_step = time.perf_counter(), done
        if active:
            from torch.utils.tensorboard import SummaryWriter

            path = output / "metrics.jsonl"
            _drop_after(path, done)
            self.metrics = open(path, "a", buffering=1)  # noqa: SIM115
            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=done + 1)

    def step(self, number: int, result: StepResult, device: torch.device) -> None:
        """Report optimizer step ``number`` (from 1) if it is one to be reported."""
        due = number % self.log_every == 0 or number == self.steps or result.skipped is not None
        if not self.active or not due:
            return
        now = time.perf_counter()
        seconds = (now - self.last_time) / max(1, number - self.last_step)
        self.last_time, self.last_step = now, number
        values = {
            "loss": result.loss,
            **{f"loss_{name}": value for name, value in result.parts.items()},
            "gradient_norm": result.gradient_norm,
            "learning_rate": result.learning_rate,
            "tokens_per_second": self.tokens_a_step / seconds,
            "memory_gib": peak_memory_bytes(device) / 2**30,
        }
        tokens = number * self.tokens_a_step
        # JSON has no NaN
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": number, "tokens": tokens, **plain, "skipped": result.skipped}
        self.metrics.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, number)
        parts = " ".join(f"{name} {value:.4f}" for name, value in result.parts.items())
        print(
            f"step {number}/{self.steps}  loss {result.loss:.4f} ({parts})  "
            f"grad {result.gradient_norm:.3g}  lr {result.learning_rate:.3g}  "
            f"{values['tokens_per_second']:,.0f} tokens/s  {values['memory_gib']:.2f} GiB  "
            f"ETA {_duration((self.steps - number) * seconds)}",
            flush=True,
        )
        if result.skipped is not None:
            print(f"skipped {result.skipped}", flush=True)

    def close(self) -> None:
        if self.active:
            self.metrics.close()
            self.board.close()


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to ``step``: what came later is computed again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break  # a killed process may leave half a line at the end
    fresh = path.with_name(path.name + ".partial")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(path)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of this process: allocated GPU memory, or resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
