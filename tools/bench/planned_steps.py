"""Measured steps of docs/figures, and their estimates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalard.config.file import load_config
from megalard.config.schema import Config
from megalard.estimate.gpus import GIB, Machines, parse_gpus
from megalard.estimate.memory import TEACHER, memory_of
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.time import micro_step_time
from megalard.estimate.weights import weights_of
from megalard.model.spec import ModelSpec, spec_from_config
from tools.bench.random_model import random_spec
from tools.bench.random_run import make_config
from tools.bench.step import OPTIMIZERS
from tools.study.pretraining import TEACHER as PROXY

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"
RECIPES = ROOT / "launch" / "configs" / "study"
_NETWORK = 50e9
# Files whose version of the benchmark did not record the number of ranks.
_DATA_RANKS = {"step_dp2.json": 2}
_SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_RECIPE_WINDOW = 8192


@dataclass(frozen=True)
class Row:
    """One measured step and its estimate.

    Attributes:
        name: the file, or the model and the method.
        tokens: of a block, or of a micro-batch.
        layout: the layout of ranks.
        blocks: blocks of a micro-batch.
        again: whether layers were computed again (activation checkpointing).
        offload: whether saved tensors were in host memory.
        memory: measured and estimated peak in bytes.
        seconds: measured and estimated time of the forward and backward pass; None if the time was
            not measured, or not with one process per GPU.
    """

    name: str
    tokens: int
    layout: RankLayout
    blocks: int
    again: bool
    offload: bool
    memory: tuple[float, float]
    seconds: tuple[float, float] | None

    @property
    def memory_difference(self) -> float:
        """The estimate relative to the measurement, minus one."""
        return self.memory[1] / self.memory[0] - 1

    @property
    def time_difference(self) -> float | None:
        """The estimate relative to the measurement, minus one; None without a measurement."""
        return None if self.seconds is None else self.seconds[1] / self.seconds[0] - 1

    def cells(self) -> list[str]:
        """Return the cells of a row with memory and time."""
        assert self.seconds is not None and self.time_difference is not None
        return [
            f"`{self.name}`",
            f"{self.blocks} x {self.tokens:,}",
            _layout(self.layout),
            _yes(self.again),
            _yes(self.offload),
            f"{self.memory[0] / GIB:.2f}",
            f"{self.memory[1] / GIB:.2f}",
            f"{self.memory_difference:+.1%}",
            f"{self.seconds[0]:.3f}",
            f"{self.seconds[1]:.3f}",
            f"{self.time_difference:+.1%}",
        ]

    def memory_cells(self) -> list[str]:
        """Return the cells of a row with memory alone."""
        return [
            self.name,
            f"{self.tokens:,}",
            _yes(self.again),
            f"{self.memory[0] / GIB:.3f}",
            f"{self.memory[1] / GIB:.3f}",
            f"{self.memory_difference:+.1%}",
        ]


def bench_rows() -> list[Row]:
    """Return the measurements of ``tools.bench.step``."""
    rows = []
    for file in sorted(FIGURES.glob("step*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        rows += [_bench_row(file, content, result) for result in content["results"]]
    return rows


def _bench_row(file: Path, content: dict, result: dict) -> Row:
    given = content["options"]
    tp, cp = int(given["tp"]), int(given["cp"])
    blocks = int(given.get("micro_batch", given.get("batch")))
    offload = str(given["offload"]) == "True"
    again = result.get("activation_checkpointing", result.get("recompute"))
    passes = result.get("forward_backward_seconds")
    seconds = passes["median"] if passes else result["micro_step_seconds"]
    dp = _DATA_RANKS.get(file.name) or content.get("ranks", tp * cp) // (tp * cp)
    layout = RankLayout(dp, cp, tp)
    config = make_config(
        {
            "model.compute_dtype": given["dtype"],
            "trainable.lora.rank": given.get("lora_rank", given.get("rank")),
            "trainable.lora.dropout": given.get("lora_dropout", given.get("dropout")),
            "objective.relations.qk": given.get("qk_weight", given.get("qk")),
            "data.context_length": result["tokens"],
            "optimizer.global_batch": blocks * dp,
            "optimizer.micro_batch": blocks,
            "parallel.activation_checkpointing": again,
            "parallel.offload": offload,
            # These versions of the benchmark did not divide the optimizer's state.
            **OPTIMIZERS[result.get("optimizer", "whole")],
        }
    )
    spec = random_spec(given["shape"], result["tokens"])
    device = content.get("environment", {}).get("device", "H200" if "h200" in file.stem else "H100")
    _, gpu = parse_gpus(device, None, None)
    machines = Machines(gpu, layout.ranks, 1, _NETWORK)
    (stream,) = config.all_streams().values()
    estimated = sum(micro_step_time(config, stream, spec, layout, machines).values())
    return Row(
        file.name,
        result["tokens"],
        layout,
        blocks,
        again,
        offload,
        (result["peak_gib"] * GIB, memory_of(config, spec, layout).total),
        (seconds, estimated),
    )


def study_rows() -> list[Row]:
    """Return the peak memory of the methods of both studies, the largest of all runs of each."""
    return [*_pretrained_rows(), *_proxy_rows()]


def _pretrained_rows() -> Iterator[Row]:
    spec = spec_from_config(_llama(_SMOLLM2), "SmolLM2")
    for method, peak in _peaks(FIGURES / "restoration" / "pretrained", "final").items():
        if "+" in method:
            continue
        stage = yaml.safe_load((RECIPES / "pretrained" / f"{method}.yaml").read_text())
        long = stage.get("streams", {}).get("long")
        if long is not None:
            long["data"] = {"context_length": 4 * _RECIPE_WINDOW}
        settings = {
            "rope.factor": 4,
            "parallel.activation_checkpointing": json.dumps(long is not None),
            "stages.x": json.dumps(stage),
        }
        yield _study_row(f"SmolLM2-135M, {method}", _config(None, settings), spec, peak)


def _proxy_rows() -> Iterator[Row]:
    spec = spec_from_config(_llama({"vocab_size": 8192, **PROXY}), "the proxy")
    for method, peak in _peaks(FIGURES / "restoration", "timing").items():
        recipe = RECIPES / f"{method}.yaml"
        yield _study_row(f"23.5M, {method}", _config(str(recipe), {}), spec, peak)


def _study_row(name: str, config: Config, spec: ModelSpec, peak: float) -> Row:
    layout = RankLayout()
    # The studies ran with torch 2.11, whose kernel for packed documents repeats heads of k and v.
    memory = memory_of(config, spec, layout, repeats_kv=True)
    total: float = memory.total
    if name.startswith("SmolLM2") and not memory.kinds[TEACHER]:
        # This study kept the teacher, to measure it, where a run drops it.
        total += sum(weights_of(spec, layout).values()) * 2
    (stage,) = config.all_stages().values()
    largest = max(stage.all_streams().values(), key=lambda s: s.micro_batch * s.data.context_length)
    return Row(
        name,
        largest.micro_batch * largest.data.context_length,
        layout,
        largest.micro_batch,
        config.parallel.activation_checkpointing,
        False,
        (peak, total),
        None,
    )


def _peaks(folder: Path, kind: str) -> dict[str, float]:
    """Return the largest peak memory of each method, in bytes."""
    peaks: dict[str, float] = {}
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        if result.get("kind") == kind and result.get("peak_memory"):
            method = result["method"]
            peaks[method] = max(result["peak_memory"], peaks.get(method, 0))
    return peaks


def _config(recipe: str | None, settings: dict[str, Any]) -> Config:
    words = [f"--{key}={value}" for key, value in settings.items()]
    return load_config(recipe, words, has_files=False)


def _llama(shape: dict) -> dict:
    return {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, **shape}


def _layout(layout: RankLayout) -> str:
    sizes = {"dp": layout.dp, "cp": layout.cp, "tp": layout.tp}
    return " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 GPU"


def _yes(value: bool) -> str:
    return "yes" if value else ""
