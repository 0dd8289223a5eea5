"""One run of the study: a method restores a scaled teacher and is measured on the way."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from megalard.config.file import load_config
from megalard.config.schema import Config
from megalard.data.token_store import TokenStore
from megalard.data.tokenizer import load_tokenizer
from megalard.evaluation.measure import Measurement, cut_windows
from megalard.evaluation.suite import Suite, make_samples, run_suite
from megalard.evaluation.tasks import sentence_filler
from megalard.model.decoder import Decoder
from megalard.parallel.mesh import Mesh, build_mesh
from megalard.training import assemble
from megalard.training.monitor import peak_memory_bytes
from megalard.training.step import Distiller
from tools.study.methods import FACTOR, METHODS, NATIVE, config_file

SHORT = (NATIVE // 4, NATIVE // 2, NATIVE)
WINDOW = NATIVE * FACTOR
EDGES = [1, 64, 128, 256, 512, 1024, 1536, 2048, 2560, 3072, 3584, 4096]
TASKS = ("passkey", "multi_key")
TASK_LENGTHS = (NATIVE, 2 * NATIVE, 4 * NATIVE, WINDOW)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Sizes:
    """How much is measured: tokens a domain and length, samples a task, length and depth."""

    validation: int = 32_768
    milestone: int = 16_384
    short: int = 65_536
    long: int = 131_072
    samples: int = 8


@dataclass(frozen=True)
class Run:
    """What is done: ``kind`` is search, final, timing or baseline.

    ``method`` is of ``METHODS``, or teacher or scaled, which are only measured.
    """

    kind: str
    method: str
    rope: str
    rate: float = 0.0
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.method}/{self.rope}/{self.rate:g}/{self.seed}"


class Study:
    """The folder of a study, and what all of its runs measure with.

    Args:
        folder: holds ``teacher/`` and ``corpus/``.
        domain: the one whose text restores.
        device: auto, cpu or cuda.
        shrink: divides every token budget and measurement, to try the whole quickly.
    """

    def __init__(self, folder: Path, domain: str, device: str, shrink: int = 1):
        self.folder, self.domain, self.device, self.shrink = folder, domain, device, shrink
        self.sizes = Sizes(*(max(1, size // shrink) for size in asdict(Sizes()).values()))

    @cached_property
    def mesh(self) -> Mesh:
        return build_mesh(self.device, 1)

    @property
    def on_gpu(self) -> bool:
        return self.mesh.device.type == "cuda"

    @cached_property
    def domains(self) -> list[str]:
        """Every domain of text; the synthetic one is measured by its tasks."""
        found = {path.parent.name for path in (self.folder / "corpus").glob("*/test")}
        return sorted(found - {"synthetic"})

    def windows(self, domain: str, split: str, lengths, tokens: int) -> dict[int, np.ndarray]:
        store = TokenStore.open(self.folder / "corpus" / domain / split)
        return cut_windows(store.read(0, len(store.tokens)), lengths, tokens)

    @cached_property
    def tasks(self) -> Suite:
        tokenizer = load_tokenizer(str(self.folder / "teacher"))
        filler = sentence_filler(tokenizer)
        samples, skipped = make_samples(
            TASKS, tokenizer, TASK_LENGTHS, filler, DEPTHS, self.sizes.samples
        )
        return Suite({}, samples, skipped)

    def config(self, run: Run, steps: int = 1) -> Config:
        """The run's configuration: the recipe, the rate, and where things are."""
        name = run.method if run.method in METHODS else "linearard"
        return load_config(
            str(config_file(name)),
            [
                f"--model.teacher={self.folder / 'teacher'}",
                f"--model.native_context={NATIVE}",
                f"--model.compute_dtype={'bfloat16' if self.on_gpu else 'float32'}",
                f"--rope.type={run.rope}",
                f"--rope.factor={FACTOR}",
                f"--data.paths=[{self.folder / 'corpus' / self.domain / 'train'}]",
                *([f"--optimizer.learning_rate={run.rate}"] if run.rate else []),
                f"--optimizer.steps={steps}",
                f"--run.seed={run.seed}",
                "--run.output=unused",
                # a teacher to compare with, whatever the streams; not where its memory would count
                f"--evaluation.paths=[{'unused' if run.kind != 'timing' else ''}]",
            ],
        )


def execute(study: Study, run: Run) -> dict:
    """Train and measure; the result is JSON."""
    per_step = study.config(run).tokens_a_step
    method = METHODS.get(run.method)
    tokens = {
        "search": method.search_tokens if method else 0,
        "final": method.tokens if method else 0,
        "timing": 15 * per_step * study.shrink,
    }.get(run.kind, 0)
    steps = int(tokens / study.shrink / per_step)
    config = study.config(run, max(1, steps))
    mesh = study.mesh
    plan = assemble.make_plan(config, mesh)
    teacher, student, _ = assemble.load_models(config, plan, mesh)
    dtype = getattr(torch, config.model.compute_dtype)
    model = teacher if run.method == "teacher" else student.decoder
    result = {**asdict(run), "key": run.key, "tokens_a_step": per_step, "curve": []}

    def measure(split: str, lengths, size: int, domains: list[str]) -> dict:
        found = {}
        for domain in domains:
            suite = Suite(study.windows(domain, split, lengths, size))
            results = run_suite(model, suite, mesh, dtype, teacher, NATIVE)
            found[domain] = _by_length(results.by_length)
        return found

    if steps:
        stores = assemble.open_streams(config, study.folder, plan, mesh)
        distiller = Distiller(teacher, student, config, mesh)
        marks = {}
        if run.kind == "final":
            # never more than the milestone says
            marks = {int(m / study.shrink / per_step): m for m in method.milestones()}
        times = []
        if study.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with assemble.make_loaders(config, stores, plan, mesh) as loaders:
            for step in range(steps):
                start = time.perf_counter()
                found = distiller.step(loaders.step(step, mesh.device), step)
                times.append(time.perf_counter() - start)
                if step + 1 in marks:
                    domains = measure("test", SHORT, study.sizes.milestone, study.domains)
                    result["curve"].append({"tokens": (step + 1) * per_step, "domains": domains})
                    if marks[step + 1] == method.compared_at:
                        result["compared"] = _full(study, model, teacher, dtype)
        result |= {
            "loss": found.loss,
            "parts": found.parts,
            "seconds_a_step": float(np.median(times[5:] or times)),
            "peak_memory": peak_memory_bytes(mesh.device),
        }
    if run.kind == "search":
        own = [study.domain]
        result["validation"] = measure("validation", (*SHORT, WINDOW), study.sizes.validation, own)
    elif run.kind == "baseline":
        domains = measure("test", SHORT, study.sizes.milestone, study.domains)
        result["curve"].append({"tokens": 0, "domains": domains})
        result["compared"] = _full(study, model, teacher, dtype)
    return result


def _full(study: Study, model: Decoder, teacher: Decoder, dtype: torch.dtype) -> dict:
    """Everything that is measured of a model on test text."""
    domains = {}
    for domain in study.domains:
        suite = Suite(study.windows(domain, "test", SHORT, study.sizes.short))
        short = run_suite(model, suite, study.mesh, dtype, teacher, NATIVE)
        suite = Suite(study.windows(domain, "test", (WINDOW,), study.sizes.long))
        long = run_suite(model, suite, study.mesh, dtype, edges=EDGES)
        domains[domain] = {
            **_by_length(short.by_length),
            **_by_length(long.by_length),
            "by_position": [asdict(found) for found in long.by_position],
        }
    tasks = run_suite(model, study.tasks, study.mesh, dtype).tasks
    return {
        "domains": domains,
        "tasks": {
            task: {str(length): asdict(found) for length, found in by.items()}
            for task, by in tasks.items()
        },
    }


def _by_length(found: dict[int, Measurement]) -> dict:
    return {str(length): asdict(m) for length, m in found.items()}
