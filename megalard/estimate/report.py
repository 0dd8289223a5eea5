"""What ``megalard plan`` prints, as lines, and as JSON takes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megalard.config.schema import Config
from megalard.estimate.gpus import GIB, TIME_ERROR, UNMEASURED_TIME_ERROR, Machines
from megalard.estimate.layouts import Candidate
from megalard.estimate.memory import MEMORY_ERROR
from megalard.estimate.remedies import Remedy
from megalard.model.spec import ModelSpec

ALLOCATOR = "CUDA context and allocator (assumed)"
# The fastest steps of a model of 6 layers that were measured took 7 ms per layer and micro-batch,
# because the host launched kernels more slowly than the GPU computed them.
HOST_SECONDS_PER_LAYER = 0.007
_SHOWN_LAYOUTS = 12


@dataclass(frozen=True)
class PlanResult:
    """Everything that a plan reports.

    Attributes:
        config, spec, machines: what was planned.
        fitting: the layouts that fit, the fastest first.
        least: of all layouts that can run, the one that needs least memory.
        faster: the fastest layout without activation checkpointing, if it fits and is faster.
        remedies: what to change if none fits.
        more_gpus: more GPUs and their fastest layout, if none fits on these.
    """

    config: Config
    spec: ModelSpec
    machines: Machines
    fitting: list[Candidate]
    least: Candidate
    faster: Candidate | None
    remedies: list[Remedy]
    more_gpus: tuple[Machines, Candidate] | None

    @property
    def shown(self) -> Candidate:
        """The layout whose memory is shown by kind."""
        return self.fitting[0] if self.fitting else self.least

    @property
    def time_error(self) -> float:
        """The stated relative error of times."""
        return TIME_ERROR if self.machines.gpu.is_measured else UNMEASURED_TIME_ERROR


def plan_lines(result: PlanResult) -> Iterator[str]:
    """Yield the lines of the report."""
    yield from _what_is_planned(result)
    yield ""
    yield from memory_lines(result.shown, result.machines)
    yield ""
    if result.fitting:
        yield from _fitting_lines(result)
    else:
        yield from _remedy_lines(result)


def _what_is_planned(result: PlanResult) -> Iterator[str]:
    spec, config = result.spec, result.config
    yield f"model     {spec.family}, {spec.num_layers} layers of {spec.hidden_size}"
    yield f"GPUs      {result.machines}"
    for name, stage in config.all_stages().items():
        steps, tokens = stage.optimizer.steps, stage.tokens_per_step
        label = "run" if not config.stages else name
        yield (
            f"{label:<9} {steps} steps of {tokens:,} tokens: {steps * tokens:,} tokens "
            f"({stage.trainable.mode})"
        )


def memory_lines(candidate: Candidate, machines: Machines) -> Iterator[str]:
    """Yield the memory of one GPU by kind."""
    memory = candidate.memory
    place = memory.instant
    if memory.stage != "main":
        place += f", stage {memory.stage}"
    if memory.stream != "main":
        place += f", stream {memory.stream}"
    yield f"memory of one GPU with {candidate.layout}, which is largest at {place}:"
    for kind, size in memory.kinds.items():
        if size >= GIB / 200:
            yield f"  {kind:<40}{size / GIB:8.2f} GiB"
    yield f"  {ALLOCATOR:<40}{candidate.allocator / GIB:8.2f} GiB"
    yield (
        f"  {'all':<40}{candidate.needed / GIB:8.2f} GiB of {machines.gpu.memory / GIB:.1f} GiB "
        f"(± {MEMORY_ERROR:.0%})"
    )
    for kind, size in memory.host.items():
        node = size * machines.per_node / GIB
        yield f"{kind}: {size / GIB:.2f} GiB per GPU, {node:.1f} GiB per node"


def _fitting_lines(result: PlanResult) -> Iterator[str]:
    error = f"± {result.time_error:.0%}"
    if not result.machines.gpu.is_measured:
        error += f", because no rate of a {result.machines.gpu.name} was measured"
    yield f"layouts that fit, the fastest first; times are estimates ({error}) without evaluation,"
    yield "saves and the compilation in the first steps:"
    shown = result.fitting[:_SHOWN_LAYOUTS]
    width = max(11, *(len(_seconds_per_step(candidate)) for candidate in shown))
    yield (
        f"  {'dp':>4} {'cp':>4} {'tp':>4} {'GiB per GPU':>12} {'s per step':>{width}} "
        f"{'tokens/s':>10} {'run':>10}"
    )
    for candidate in shown:
        yield _row(candidate, result.config, width)
    left = len(result.fitting) - _SHOWN_LAYOUTS
    if left > 0:
        yield f"  and {left} slower layouts"
    best = result.fitting[0]
    layout = best.layout
    yield f"the fastest: --parallel.tp {layout.tp} --parallel.cp {layout.cp}"
    if best.is_close:
        yield "whether it fits lies within the error of the estimate: run megalard preflight first"
    if result.faster is not None:
        faster = result.faster
        yield (
            f"faster: parallel.activation_checkpointing false takes {duration(faster.seconds)} "
            f"with {faster.layout} and {faster.needed / GIB:.1f} GiB per GPU"
        )
    if _is_host_bound(best, result):
        yield (
            "so small a step may wait for the host, which launches its kernels, and then takes "
            "longer than estimated"
        )


def _is_host_bound(candidate: Candidate, result: PlanResult) -> bool:
    """Whether the GPU may compute a layer faster than the host launches its kernels."""
    for name, stage in result.config.all_stages().items():
        count = sum(
            -(-stream.global_batch // (stream.micro_batch * candidate.layout.dp))
            for stream in stage.all_streams().values()
        )
        per_layer = candidate.times[name].seconds / count / result.spec.num_layers
        if per_layer < HOST_SECONDS_PER_LAYER:
            return True
    return False


def _seconds_per_step(candidate: Candidate) -> str:
    """Return the seconds of a step of each stage, such as ``0.82 / 10.7``."""
    return " / ".join(f"{time.seconds:.3g}" for time in candidate.times.values())


def _row(candidate: Candidate, config: Config, width: int) -> str:
    """Return the line of a layout; the seconds of its steps take ``width`` columns."""
    layout, seconds = candidate.layout, candidate.seconds
    steps, tokens = _seconds_per_step(candidate), config.tokens / seconds
    close = " within the error of memory" if candidate.is_close else ""
    return (
        f"  {layout.dp:>4} {layout.cp:>4} {layout.tp:>4} {candidate.needed / GIB:>12.1f} "
        f"{steps:>{width}} {tokens:>10,.0f} {duration(seconds):>10}{close}"
    )


def _remedy_lines(result: PlanResult) -> Iterator[str]:
    least = result.least
    short = (least.needed - least.capacity) / GIB
    yield f"no layout fits: {least.layout} needs least, and lacks {short:.1f} GiB per GPU"
    if least.is_close:
        yield "this lies within the error of the estimate: megalard preflight measures it"
    for remedy in result.remedies:
        end = "which is not enough alone"
        if remedy.best is not None:
            best = remedy.best
            end = (
                f"and then {best.layout} fits with {best.needed / GIB:.1f} GiB and "
                f"{duration(best.seconds)} for the run"
            )
        yield (
            f"  {remedy.change.words} ({remedy.change.setting}) saves "
            f"{remedy.saved / GIB:.1f} GiB per GPU, {end}"
        )
    if result.more_gpus is not None:
        machines, best = result.more_gpus
        yield (
            f"  {machines} fit it without a change, with {best.layout}, "
            f"{best.needed / GIB:.1f} GiB per GPU and {duration(best.seconds)} for the run"
        )


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 120 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def plan_json(result: PlanResult) -> dict:
    """Return the report as JSON takes it; sizes are bytes and times are seconds."""
    return {
        "gpus": _gpus_json(result.machines),
        "memory_error": MEMORY_ERROR,
        "time_error": result.time_error,
        "fits": bool(result.fitting),
        "layouts": [candidate_json(candidate) for candidate in result.fitting],
        "needs_least": candidate_json(result.least),
        "without_activation_checkpointing": _optional(result.faster),
        "changes": [
            {
                "setting": remedy.change.setting,
                "saves": remedy.saved,
                "fits_with": _optional(remedy.best),
            }
            for remedy in result.remedies
        ],
        "on_more_gpus": None if result.more_gpus is None else _on(*result.more_gpus),
    }


def _gpus_json(machines: Machines) -> dict:
    return {
        "name": machines.gpu.name,
        "memory": round(machines.gpu.memory),
        "per_node": machines.per_node,
        "nodes": machines.nodes,
    }


def _on(machines: Machines, best: Candidate) -> dict:
    return {"gpus": _gpus_json(machines), **candidate_json(best)}


def _optional(candidate: Candidate | None) -> dict | None:
    return None if candidate is None else candidate_json(candidate)


def candidate_json(candidate: Candidate) -> dict:
    """Return one layout with its estimate."""
    layout = candidate.layout
    return {
        "dp": layout.dp,
        "cp": layout.cp,
        "tp": layout.tp,
        "bytes": candidate.needed,
        "host_bytes": candidate.memory.host.total(),
        "host_kinds": dict(candidate.memory.host),
        "kinds": {**candidate.memory.kinds, ALLOCATOR: candidate.allocator},
        "stage": candidate.memory.stage,
        "instant": candidate.memory.instant,
        "seconds_per_step": {name: time.seconds for name, time in candidate.times.items()},
        "seconds": candidate.seconds,
    }
