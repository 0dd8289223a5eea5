"""The work of ``tools/evaluate.py``: from its options to tables, JSON and PNG."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megalard.checkpoint.build import load_decoder
from megalard.checkpoint.open import Model, open_model
from megalard.data.tokenizer import Tokenizer, load_tokenizer
from megalard.errors import UserError
from megalard.evaluation.comparison import (
    Entry,
    draw,
    print_tables,
    short_names,
    to_json,
    token_bar,
)
from megalard.evaluation.measure import cut_windows, default_lengths
from megalard.evaluation.suite import Suite, make_samples, read_text, run_suite
from megalard.evaluation.tasks import TASKS, sentence_filler, text_filler
from megalard.model.decoder import Decoder
from megalard.model.rope import rope_table
from megalard.parallel.agreement import checked_meanwhile, checked_on_all_ranks
from megalard.parallel.mesh import Mesh
from megalard.parallel.tensor.layout import check_divisible

# more filler than the longest texts need
_FILLER_TOKENS = 1_000_000


@dataclass(frozen=True)
class _Job:
    models: list[Model]
    teacher: Model | None
    suite: Suite
    dtype: torch.dtype
    text_tokens: int
    files: tuple[Path, Path]


def compare(options: Namespace, mesh: Mesh) -> None:
    """Measure the models that the options name; a collective call of all ranks.

    Raises:
        UserError: on every rank, before anything is measured or written, for bad input.
    """
    with checked_on_all_ranks(mesh.world):
        job = _plan(options, mesh)
    first = mesh.world.rank == 0
    if first:
        for line in _warnings(job):
            print(f"megalard: warning: {line}", file=sys.stderr)
    teacher = None if job.teacher is None else _load(job.teacher, mesh, job.dtype)
    window = job.teacher.spec.max_positions if job.teacher else 0
    names = short_names([model.directory for model in job.models])
    entries = []
    with token_bar(job.suite.tokens(window) * len(names), mesh.world) as bar:
        for name, model in zip(names, job.models, strict=True):
            bar(name, 0)
            decoder = _load(model, mesh, job.dtype)
            results = run_suite(
                decoder,
                job.suite,
                mesh,
                job.dtype,
                teacher,
                window,
                advance=lambda tokens, name=name: bar(name, tokens),
            )
            # before the next one is loaded
            del decoder
            entries.append(
                Entry(name, str(model.directory), model.kind, model.spec.max_positions, results)
            )
    with checked_on_all_ranks(mesh.world):
        if first:
            _write(job.files, entries, _settings(options, job, mesh))
            print_tables(entries)
            print(*job.files, sep="\n")


def _plan(options: Namespace, mesh: Mesh) -> _Job:
    """Everything that can go wrong before a weight is read."""
    _check_numbers(options)
    files = _output_files(options.output, mesh)
    models = [open_model(path, options.base) for path in options.models]
    teacher = open_model(options.teacher, options.base) if options.teacher else None
    everything = [*models, *([teacher] if teacher else [])]
    for model in everything:
        check_divisible(model.spec, mesh.tp.size)
        rope_table(model.spec)
    tokenizer = _tokenizer(options.tokenizer, everything)
    pieces = mesh.tp.size if mesh.cp.size == 1 else 2 * mesh.cp.size * mesh.tp.size
    lengths = choose_lengths(options.lengths, models, pieces)
    task_lengths = (
        choose_lengths(options.task_lengths, models, pieces) if options.task_lengths else lengths
    )

    text, windows, samples, skipped = None, {}, {}, ()
    if options.text:
        filler = _FILLER_TOKENS if options.filler == "text" else 0
        count = max(options.max_tokens, filler, *lengths)
        text = read_text(options.text, tokenizer, count, options.text_key)
        windows = cut_windows(text, lengths, options.max_tokens)
    if options.tasks:
        filler = sentence_filler(tokenizer) if options.filler == "sentences" else None
        samples, skipped = make_samples(
            options.tasks,
            tokenizer,
            task_lengths,
            filler or text_filler(tokenizer, text),
            sorted({float(depth) for depth in options.depths}),
            options.samples,
            options.seed,
            _bos(models[0]) if options.bos else (),
        )
    suite = Suite(windows, samples, skipped)
    if not windows and not samples:
        raise UserError(
            "there is nothing to measure: give --text, or --tasks and lengths that hold them "
            f"(tried {', '.join(map(str, task_lengths))} tokens)"
        )
    for model in everything:
        if suite.largest_id() >= model.spec.vocab_size:
            raise UserError(
                f"the tokenizer gives the id {suite.largest_id()} but {model.directory} has only "
                f"{model.spec.vocab_size} rows of embedding: give the model's own --tokenizer"
            )
    name = options.dtype or ("bfloat16" if mesh.device.type == "cuda" else "float32")
    return _Job(
        models, teacher, suite, getattr(torch, name), 0 if text is None else len(text), files
    )


def _check_numbers(options: Namespace) -> None:
    unknown = [task for task in options.tasks if task not in TASKS]
    if unknown:
        raise UserError(f"there is no task {unknown[0]}: choose from {', '.join(TASKS)}")
    if options.teacher and not options.text:
        raise UserError("--teacher is compared with on text: give --text, or leave --teacher out")
    if options.tasks and options.filler == "text" and not options.text:
        raise UserError("--filler text hides statements in the text: give --text")
    for name in ("samples", "max_tokens"):
        if getattr(options, name) < 1:
            value, flag = getattr(options, name), "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {value}: give a positive number")
    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}: give a number of at least 0")
    for depth in options.depths:
        if not 0 <= depth <= 1:
            raise UserError(f"--depths has {depth:g}: depths are from 0 (first) to 1 (last)")


def _output_files(output: Path, mesh: Mesh) -> tuple[Path, Path]:
    stem = output.with_suffix("") if output.suffix in (".json", ".png") else output
    files = tuple(stem.with_name(stem.name + suffix) for suffix in (".json", ".png"))
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists and is not overwritten: choose another --output")
    if mesh.world.rank == 0:
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            # found out now, not after hours of measuring
            probe = stem.with_name(f".{stem.name}.probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"cannot write to {stem.parent}: {error.strerror}") from None
    return files


def _tokenizer(given: Path | None, models: list[Model]) -> Tokenizer:
    """The one tokenizer of all models, or the given one."""
    if given is not None:
        return load_tokenizer(given)
    found = []
    for model in models:
        own = any(path.name.startswith("tokenizer") for path in model.companions)
        found.append(
            load_tokenizer(model.directory if own or not model.base else model.base.directory)
        )
    for model, tokenizer in zip(models, found, strict=True):
        if tokenizer.fingerprint != found[0].fingerprint:
            raise UserError(
                f"{model.directory} has another tokenizer than {models[0].directory}, so their "
                "figures per token cannot be compared: evaluate them apart, or give one --tokenizer"
            )
    return found[0]


def choose_lengths(given: list[str] | None, models: list[Model], pieces: int) -> list[int]:
    """The lengths asked for, or the default ones, rising."""
    if given is None:
        windows = [model.spec.max_positions for model in models]
        lengths = default_lengths(min(windows), max(windows) / min(windows))
        return sorted({length // pieces * pieces for length in lengths} - {0})
    lengths = sorted({parse_length(text) for text in given})
    for length in lengths:
        if length % pieces:
            raise UserError(
                f"length {length} is not a multiple of {pieces}, into which --tp and --cp cut it: "
                f"use {max(pieces, length // pieces * pieces)}"
            )
    return lengths


def parse_length(text: str) -> int:
    """``4096`` or ``4K`` tokens.

    Raises:
        UserError: it is no length of at least 2.
    """
    number, unit = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not number.isdecimal() or int(number) * unit < 2:
        raise UserError(f'"{text}" is no length: write tokens, as 4096 or 4K')
    return int(number) * unit


def _bos(model: Model) -> tuple[int, ...]:
    bos = model.spec.hf_config.get("bos_token_id")
    if not isinstance(bos, int):
        raise UserError(f"{model.directory} names no bos_token_id in config.json: leave out --bos")
    return (bos,)


def _warnings(job: _Job) -> list[str]:
    lengths = {*job.suite.windows, *(n for by in job.suite.samples.values() for n in by)}
    lines = []
    for model in job.models:
        beyond = sorted(length for length in lengths if length > model.spec.max_positions)
        if beyond:
            lines.append(
                f"{model.directory} has a window of {model.spec.max_positions} tokens and is "
                f"measured beyond it, at {', '.join(map(str, beyond))}"
            )
    if job.teacher:
        window = job.teacher.spec.max_positions
        beyond = sorted(length for length in job.suite.windows if length > window)
        if beyond:
            lines.append(
                f"models are not compared with the teacher beyond its window of {window} tokens, "
                f"at {', '.join(map(str, beyond))}"
            )
    for task in sorted({task for task, _ in job.suite.skipped}):
        short = [str(length) for name, length in job.suite.skipped if name == task]
        lines.append(f"{', '.join(short)} tokens are too few for the task {task}, left out there")
    return lines


def _load(model: Model, mesh: Mesh, dtype: torch.dtype) -> Decoder:
    """Where the files' checksums are recorded they are compared meanwhile."""
    with checked_meanwhile(partial(model.check_sums, mesh.world), mesh.world) as wait_for_checksums:
        with checked_on_all_ranks(mesh.world):
            rope = rope_table(model.spec)
            decoder = load_decoder(model.spec, rope, mesh.tp, model.weights, mesh.device, dtype)
        wait_for_checksums()
    return decoder


def _settings(options: Namespace, job: _Job, mesh: Mesh) -> dict:
    return {
        "text": [str(path) for path in options.text],
        "text_tokens": {str(n): windows.size for n, windows in job.suite.windows.items()},
        "teacher": None if job.teacher is None else str(job.teacher.directory),
        "tasks": list(job.suite.samples),
        "depths": sorted({float(depth) for depth in options.depths}),
        "samples_a_depth": options.samples,
        "filler": options.filler,
        "seed": options.seed,
        "bos": options.bos,
        "dtype": str(job.dtype).removeprefix("torch."),
        "device": mesh.device.type,
        "layout": {"dp": mesh.dp.size, "cp": mesh.cp.size, "tp": mesh.tp.size},
    }


def _write(files: tuple[Path, Path], entries: list[Entry], settings: dict) -> None:
    """Both files, each complete or not there."""
    contents = (
        lambda path: path.write_text(to_json(entries, settings)),
        lambda path: draw(path, entries),
    )
    for file, write in zip(files, contents, strict=True):
        partial = file.with_name(f".{file.name}.partial")
        try:
            write(partial)
            # a link, unlike a rename, does not replace what appeared there meanwhile
            file.hardlink_to(partial)
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from None
        finally:
            partial.unlink(missing_ok=True)
