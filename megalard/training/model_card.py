"""The model card of a finished run: base model, method, tokens, RoPE, and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from megalard.config.file import recorded_config
from megalard.config.schema import Config
from megalard.errors import UserError, reason_of
from megalard.files.reading import read_json
from megalard.training.run_folder import FINISHED


def model_card(directory: Path, base_model: str, license_name: str | None, name: str) -> str:
    """Return the text of a README.md with its metadata, for the student of a finished run.

    It has no path of this machine.

    Args:
        directory: the output directory of the run.
        base_model: the teacher's name on the hub.
        license_name: an identifier of the hub, such as ``apache-2.0``; None leaves it out.
        name: the name of the student on the hub.

    Raises:
        UserError: the directory holds no finished run, or a file of the run is damaged.
    """
    if not (directory / FINISHED).is_file():
        raise UserError(
            f"{directory} holds no finished run (it has no {FINISHED}): give the run.output of one"
        )
    try:
        return _card(directory, base_model, license_name, name)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"a file of the run {directory} is damaged ({reason_of(error)}): restore "
            f"{FINISHED}, evaluation.json or student/config.json"
        ) from None


def _card(directory: Path, base_model: str, license_name: str | None, name: str) -> str:
    config = recorded_config(read_json(directory / FINISHED))
    student = read_json(directory / "student" / "config.json")
    data = ModelCardData(
        base_model=base_model,
        license=license_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "rope-scaling", "megalard"],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"[{base_model}](https://huggingface.co/{base_model}) with a window of "
        f"{_window(student):,} tokens, restored by megalard.",
        f"## Method\n\n{_method(config)}",
        f"## RoPE\n\n{_rope(student)}",
        f"## Measured\n\n{_measured(directory)}",
    ]
    return "\n\n".join(sections) + "\n"


def _window(student: dict[str, Any]) -> int:
    return student["max_position_embeddings"]


def _method(config: Config) -> str:
    """Return a table of the stages: what was trained, on what, against what."""
    rows = ["| stage | trained | loss | steps | tokens |", "|---|---|---|---|---|"]
    for name, stage in config.all_stages().items():
        terms = [
            f"{weight:g} {term}"
            for stream in stage.all_streams().values()
            for term, weight in _terms(stream.objective)
        ]
        steps = stage.optimizer.steps
        tokens = steps * stage.tokens_per_step
        trained = _trained(stage)
        rows.append(f"| {name} | {trained} | {', '.join(terms)} | {steps:,} | {tokens:,} |")
    rows.append(f"\nTraining tokens of all stages: {config.tokens:,}.")
    return "\n".join(rows)


def _trained(stage: Config) -> str:
    trainable = stage.trainable
    if trainable.mode == "lora":
        return f"LoRA of rank {trainable.lora.rank} on {', '.join(trainable.lora.targets)}"
    return "all weights" if trainable.mode == "all" else ", ".join(trainable.weights)


def _terms(objective) -> list[tuple[str, float]]:
    """Return the names and weights of the terms of a loss."""
    relations = [
        (f"relation {name.upper()}", weight) for name, weight in vars(objective.relations).items()
    ]
    others = [
        ("attention outputs", objective.attention_output),
        ("hidden states", objective.hidden_cosine),
        ("KL of the logits", objective.logits_kl),
        ("next token", objective.language_modelling),
    ]
    return [(name, weight) for name, weight in (*relations, *others) if weight]


def _rope(student: dict[str, Any]) -> str:
    """Return RoPE's parameters as the student's config.json has them."""
    rope = student.get("rope_scaling") or student.get("rope_parameters") or {}
    values = {"rope_theta": student.get("rope_theta"), **rope}
    rows = [f"| {key} | {value} |" for key, value in values.items() if value is not None]
    return "\n".join(["| key | value |", "|---|---|", *rows])


def _measured(directory: Path) -> str:
    """Return perplexity by length of the teacher and the students, if the run was evaluated."""
    file = directory / "evaluation.json"
    if not file.is_file():
        return "The run was not evaluated."
    content = read_json(file)
    models = content["models"]
    lengths = list(models[0]["by_length"])
    header = ["model", *(f"{int(n):,}" for n in lengths), "gap restored"]
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for model in models:
        perplexities = [model["by_length"][n]["perplexity"] for n in lengths]
        values = ["-" if value is None else f"{value:.4g}" for value in perplexities]
        gap = model.get("gap_restored")
        share = "" if gap is None else f"{gap:.1%}"
        rows.append(f"| {' | '.join([model['name'], *values, share])} |")
    return "Perplexity of held-out text by length in tokens:\n\n" + "\n".join(rows)
