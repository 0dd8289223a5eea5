"""Measure several models on the same text and tasks, and write the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from megalard.checkpoint.build import load_decoder
from megalard.checkpoint.open import StoredModel, open_model
from megalard.checkpoint.weights import dtype_name
from megalard.config.lengths import parse_length
from megalard.data.boundaries import Choice, boundaries_of
from megalard.data.tokenizer import Tokenizer, load_tokenizer
from megalard.errors import UserError, shown
from megalard.evaluation.measure import check_lengths, cut_windows, default_lengths, length_multiple
from megalard.evaluation.plots import draw
from megalard.evaluation.report import Entry, print_tables, write_json
from megalard.evaluation.samples import Sample, sentence_filler, text_filler
from megalard.evaluation.suite import Suite, make_samples, read_text, run_suite
from megalard.evaluation.tasks import TASKS
from megalard.model.decoder import Decoder
from megalard.model.rope import rope_table
from megalard.parallel.agreement import checked_meanwhile, checked_on_all_ranks
from megalard.parallel.mesh import Mesh
from megalard.parallel.tensor.slices import check_divisible
from megalard.progress import token_bar
from megalard.reporter import Reporter

# More filler than the longest texts need.
_FILLER_TOKENS = 1_000_000


@dataclass(frozen=True)
class Request:
    """What is compared on what.

    Attributes:
        models: the directories of the models.
        output: the name of the two files to write, without their suffixes.
        text: text files, directories, or one token store.
        text_key: key of the text in .jsonl files.
        max_tokens: tokens of the text to read.
        lengths: lengths such as ``4096`` or ``4K``; None for the default lengths.
        teacher: the directory of a model to compare with.
        tasks: names of retrieval tasks.
        task_lengths: lengths of the tasks; None for ``lengths``.
        depths: places of the statement asked for, from 0 to 1.
        samples: samples for each task, length and depth.
        filler: ``sentences`` or ``text``.
        seed: another seed makes other samples.
        bos, eos: the special tokens around documents, and before windows and tasks; see
            ``megalard.data.boundaries``.
        tokenizer: the directory of one tokenizer for all models.
        base: the base model of runs' checkpoints and adapters, if it has moved.
        dtype: ``bfloat16`` or ``float32``; None for bfloat16 on a GPU and float32 on a CPU.
    """

    models: list[Path]
    output: Path
    text: list[str]
    text_key: str
    max_tokens: int
    lengths: list[str] | None
    teacher: Path | None
    tasks: list[str]
    task_lengths: list[str] | None
    depths: list[float]
    samples: int
    filler: str
    seed: int
    bos: Choice
    eos: Choice
    tokenizer: Path | None
    base: Path | None
    dtype: str | None


@dataclass(frozen=True)
class _Job:
    """A request whose inputs have been checked."""

    models: list[StoredModel]
    teacher: StoredModel | None
    suite: Suite
    dtype: torch.dtype
    files: tuple[Path, Path]


def compare_models(request: Request, mesh: Mesh) -> None:
    """Measure the models of a request and write the report; a collective call of all ranks.

    Raises:
        UserError: on every rank, for bad input, before anything is measured or written.
    """
    reporter = Reporter(mesh.is_rank_0)
    with checked_on_all_ranks(mesh.world):
        job = _check(request, mesh)
    for warning in _warnings(job):
        reporter.warning(warning)
    teacher = None if job.teacher is None else _load(job.teacher, mesh, job.dtype)
    teacher_window = job.teacher.window if job.teacher else 0
    names = short_names([model.directory for model in job.models])
    entries = []
    with token_bar(job.suite.tokens(teacher_window) * len(names), mesh.world) as bar:
        for name, model in zip(names, job.models, strict=True):
            bar(name, 0)
            decoder = _load(model, mesh, job.dtype)
            advance = partial(_advance, bar, name)
            results = run_suite(
                decoder, job.suite, mesh, job.dtype, teacher, teacher_window, advance=advance
            )
            del decoder  # before the next model is loaded
            window, directory = model.window, str(model.directory)
            entries.append(
                Entry(name, results, window=window, directory=directory, kind=model.kind)
            )
    with checked_on_all_ranks(mesh.world):
        if mesh.is_rank_0:
            settings = _settings(request, job, mesh)
            _write_new(job.files[0], lambda path: write_json(path, entries, settings))
            _write_new(job.files[1], lambda path: draw(path, entries))
            print_tables(entries)
            print(*job.files, sep="\n")


def _advance(bar: Callable[[str, int], None], name: str, tokens: int) -> None:
    bar(name, tokens)


def _check(request: Request, mesh: Mesh) -> _Job:
    """Check all inputs of a request before any weight is read."""
    _check_numbers(request)
    files = _output_files(request.output, mesh)
    models = [open_model(path, request.base) for path in request.models]
    teacher = open_model(request.teacher, request.base) if request.teacher else None
    all_models = [*models, *([teacher] if teacher else [])]
    for model in all_models:
        check_divisible(model.spec, mesh.tp.size)
        rope_table(model.spec)
    tokenizer = _common_tokenizer(request.tokenizer, all_models)
    boundaries = boundaries_of(tokenizer, request.bos, request.eos)
    lengths = choose_lengths(request.lengths, models, mesh.cp.size)
    task_lengths = lengths
    if request.task_lengths:
        task_lengths = choose_lengths(request.task_lengths, models, mesh.cp.size)

    text, windows = None, {}
    samples: dict[str, dict[int, list[Sample]]] = {}
    skipped: tuple[tuple[str, int], ...] = ()
    if request.text:
        filler_tokens = _FILLER_TOKENS if request.filler == "text" else 0
        count = max(request.max_tokens, filler_tokens, *lengths)
        text = read_text(request.text, tokenizer, boundaries, count, request.text_key)
        windows = cut_windows(text, lengths, request.max_tokens, boundaries.before)
    if request.tasks:
        filler = (
            sentence_filler(tokenizer)
            if text is None or request.filler == "sentences"
            else (text_filler(tokenizer, text))
        )
        samples, skipped = make_samples(
            request.tasks,
            tokenizer,
            task_lengths,
            filler,
            sorted({float(depth) for depth in request.depths}),
            request.samples,
            request.seed,
            boundaries.before,
        )
    suite = Suite(windows, samples, skipped)
    if not windows and not samples:
        raise UserError(
            "there is nothing to measure: give --text, or --tasks and lengths that are long enough "
            f"for them (tried {', '.join(map(str, task_lengths))} tokens)"
        )
    for model in all_models:
        if suite.largest_id() >= model.spec.vocab_size:
            raise UserError(
                f"the tokenizer gives the id {suite.largest_id()} but {model.directory} has only "
                f"{model.spec.vocab_size} rows of embedding: give the model's own --tokenizer"
            )
    name = request.dtype or ("bfloat16" if mesh.device.type == "cuda" else "float32")
    return _Job(models, teacher, suite, getattr(torch, name), files)


def _check_numbers(request: Request) -> None:
    unknown = [task for task in request.tasks if task not in TASKS]
    if unknown:
        raise UserError(f"there is no task {shown(unknown[0])}: choose from {', '.join(TASKS)}")
    if request.teacher and not request.text:
        raise UserError("models are compared with --teacher on text: give --text, or no --teacher")
    if request.tasks and request.filler == "text" and not request.text:
        raise UserError("--filler text hides statements in the text: give --text")
    for flag, value in (("--samples", request.samples), ("--max-tokens", request.max_tokens)):
        if value < 1:
            raise UserError(f"{flag} is {value}: give a positive number")
    if request.seed < 0:
        raise UserError(f"--seed is {request.seed}: give a number of at least 0")
    for depth in request.depths:
        if not 0 <= depth <= 1:
            raise UserError(f"--depths has {depth:g}: depths are from 0 (first) to 1 (last)")


def _output_files(output: Path, mesh: Mesh) -> tuple[Path, Path]:
    stem = output.with_suffix("") if output.suffix in (".json", ".png") else output
    json_file, png_file = (stem.with_name(stem.name + suffix) for suffix in (".json", ".png"))
    for file in (json_file, png_file):
        if file.exists():
            raise UserError(f"{file} exists and is not overwritten: choose another --output")
    if mesh.is_rank_0:
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            # Fail now and not after hours of measuring.
            probe = stem.with_name(f".{stem.name}.probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"cannot write to {stem.parent}: {error.strerror}") from None
    return json_file, png_file


def _common_tokenizer(given: Path | None, models: Sequence[StoredModel]) -> Tokenizer:
    """Return the given tokenizer, or the tokenizer that all models have."""
    if given is not None:
        return load_tokenizer(given)
    for model in models:
        if model.tokenizer.fingerprint != models[0].tokenizer.fingerprint:
            raise UserError(
                f"{model.directory} has another tokenizer than {models[0].directory}, so their "
                "figures per token cannot be compared: evaluate them separately, or give one "
                "--tokenizer"
            )
    return models[0].tokenizer


def choose_lengths(given: list[str] | None, models: Sequence[StoredModel], cp: int) -> list[int]:
    """Return the given lengths, or the default lengths of the models, in increasing order.

    Raises:
        UserError: a text is not a length, or the cp ranks cannot share a length.
    """
    if given is None:
        windows = [model.window for model in models]
        lengths = default_lengths(min(windows), max(windows) / min(windows))
        multiple = length_multiple(cp)
        return sorted({length // multiple * multiple for length in lengths} - {0})
    lengths = sorted({parse_length(text) for text in given})
    check_lengths(lengths, cp, "--lengths or --task-lengths")
    return lengths


def _warnings(job: _Job) -> list[str]:
    lengths = {*job.suite.windows, *(n for by in job.suite.samples.values() for n in by)}
    lines = []
    for model in job.models:
        beyond = sorted(length for length in lengths if length > model.window)
        if beyond:
            lines.append(
                f"{model.directory} has a window of {model.window} tokens and is "
                f"measured beyond it, at {', '.join(map(str, beyond))}"
            )
    if job.teacher:
        window = job.teacher.window
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


def _load(model: StoredModel, mesh: Mesh, dtype: torch.dtype) -> Decoder:
    """Load a model and compare its recorded checksums meanwhile."""
    with checked_meanwhile(partial(model.check_sums, mesh.world), mesh.world) as wait_for_checksums:
        with checked_on_all_ranks(mesh.world):
            rope = rope_table(model.spec)
            decoder = load_decoder(model.spec, rope, mesh.tp, model.weights, mesh.device, dtype)
        wait_for_checksums()
    return decoder


def _settings(request: Request, job: _Job, mesh: Mesh) -> dict:
    settings = asdict(request)
    return {
        "text": [str(path) for path in request.text],
        "text_tokens": {str(n): windows.size for n, windows in job.suite.windows.items()},
        "teacher": None if job.teacher is None else str(job.teacher.directory),
        "tasks": list(job.suite.samples),
        "depths": sorted({float(depth) for depth in request.depths}),
        "samples_per_depth": request.samples,
        **{key: settings[key] for key in ("filler", "seed", "bos", "eos")},
        "dtype": dtype_name(job.dtype),
        "device": mesh.device.type,
        "layout": {"dp": mesh.dp.size, "cp": mesh.cp.size, "tp": mesh.tp.size},
    }


def short_names(directories: list[Path]) -> list[str]:
    """Return the shortest endings of the paths that are all different, at least the last part."""
    parts = [path.absolute().parts for path in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    # The same directory was given twice.
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _write_new(file: Path, write: Callable[[Path], None]) -> None:
    """Write a file completely or not at all, and never over another file."""
    partial_file = file.with_name(f".{file.name}.partial")
    try:
        write(partial_file)
        # A link, unlike a rename, does not replace a file that appeared meanwhile.
        file.hardlink_to(partial_file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    finally:
        partial_file.unlink(missing_ok=True)
