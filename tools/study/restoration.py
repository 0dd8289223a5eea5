"""Does restoration work, and is it worth it over continued pre-training? A controlled proxy.

A small Llama-shaped teacher (native window 512) is pre-trained from scratch on several domains of
text, its RoPE is scaled by 8, and every method of the study restores it on text of one domain.
Short text in and out of that domain, long text and retrieval are measured, on test files that
nothing was trained or chosen on. Stages, in order, each resumable in the study's folder:

  python tools/study/corpus.py FOLDER/corpus        text of this machine, by domain
  python tools/study/restoration.py pretrain FOLDER
  python tools/study/restoration.py search FOLDER   learning rates, on validation text
  python tools/study/restoration.py final FOLDER    every method, RoPE and seed
  python tools/study/restoration.py timing FOLDER   time and memory of each method, alone
  python tools/study/restoration.py report FOLDER   tables and plots, from results.jsonl

See docs/restoration.md for what came out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megalard.data.tokenizer import TOKENIZER_FILES
from megalard.errors import UserError
from megalard.train import main as train
from tools.study.methods import CONFIGS, METHODS, ROPES
from tools.study.report import write_report
from tools.study.worker import Run, Study, execute

# 23.5M parameters with the corpus's vocabulary of 8192
TEACHER = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
RESULTS = "results.jsonl"


def main() -> None:
    options = parse_arguments()
    try:
        STAGES[options.stage](options)
    except UserError as error:
        print(f"study_restoration: error: {error}", file=sys.stderr)
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("folder", type=Path, help="the study's; holds corpus/, and gets the rest")
    parser.add_argument("--domain", default="python", help="text that restores (default: python)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ropes", nargs="+", default=list(ROPES), choices=list(ROPES))
    parser.add_argument("--seeds", type=int, default=3, help="of the final runs (default: 3)")
    parser.add_argument("--workers", type=int, default=1, help="runs at once, on the GPUs in turn")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=3000, help="of pre-training (default: 3000)")
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide every budget by this, to try the whole"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after so long")
    parser.add_argument(
        "--output", type=Path, default=None, help="report: where to (default: the study's folder)"
    )
    return parser.parse_args()


def pretrain(options: argparse.Namespace) -> None:
    """The teacher: random start, then megalard's own language modelling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    corpus, start = options.folder / "corpus", options.folder / "start"
    if not (corpus / "mixed" / "train").is_dir():
        raise UserError(f"{corpus} has no mixed/train: run tools/study/corpus.py {corpus} first")
    facts = json.loads((corpus / "mixed" / "train" / "meta.json").read_text())
    torch.manual_seed(0)
    eos = facts["eos_id"]
    config = LlamaConfig(
        vocab_size=facts["vocab_size"], bos_token_id=None, eos_token_id=eos, **TEACHER
    )
    LlamaForCausalLM(config).save_pretrained(start)
    _copy_tokenizer(corpus / "tokenizer", start)
    output = options.folder / "pretraining"
    train(
        [
            f"--config={CONFIGS / 'pretrain.yaml'}",
            f"--model.teacher={start}",
            f"--model.student={start}",
            f"--data.paths=[{corpus / 'mixed' / 'train'}]",
            f"--optimizer.steps={max(2, options.steps // options.shrink)}",
            f"--run.device={options.device}",
            f"--run.output={output}",
        ]
    )
    # in bf16, as the runs hold it, so that teacher and student start from the same numbers
    teacher = options.folder / "teacher"
    model = LlamaForCausalLM.from_pretrained(output / "student", dtype=torch.bfloat16)
    model.save_pretrained(teacher, max_shard_size="15MB")
    _copy_tokenizer(start, teacher)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def search(options: argparse.Namespace) -> None:
    """Every learning rate of every method."""
    runs = [
        Run("search", name, rope, rate)
        for name in options.methods
        for rope in options.ropes
        for rate in METHODS[name].rates
    ]
    run_all(options, runs)


def final(options: argparse.Namespace) -> None:
    """Every method at its best rate, for every RoPE and seed; and the untrained baselines."""
    results = read_results(options.folder)
    runs = [Run("baseline", "teacher", options.ropes[0])]
    runs += [Run("baseline", "scaled", rope) for rope in options.ropes]
    runs += [
        Run("final", name, rope, best_rate(results, name, rope), seed)
        for seed in range(1, options.seeds + 1)
        for rope in options.ropes
        for name in options.methods
    ]
    run_all(options, runs)


def timing(options: argparse.Namespace) -> None:
    """A few steps of each method, one at a time on a GPU."""
    results = read_results(options.folder)
    rope = options.ropes[0]
    runs = [Run("timing", m, rope, best_rate(results, m, rope)) for m in options.methods]
    options.workers = max(1, torch.cuda.device_count())
    run_all(options, runs)


def report(options: argparse.Namespace) -> None:
    results = shown(read_results(options.folder))
    write_report(options.output or options.folder, results, options.domain)


def shown(results: list[dict]) -> list[dict]:
    """Of the final runs those at each method's best rate, of the timed ones those of its methods.

    Others, of an earlier search or recipe, stay in the file.
    """

    def is_shown(found: dict) -> bool:
        if found["kind"] == "final":
            method, rope = found["method"], found["rope"]
            return method in METHODS and found["rate"] == best_rate(results, method, rope)
        return found["kind"] != "timing" or found["method"] in METHODS

    return [found for found in results if is_shown(found)]


def best_rate(results: list[dict], method: str, rope: str) -> float:
    """The rate with the lowest validation loss, meaned over lengths from M/4 to f M.

    A RoPE that was not searched takes the choice of one that was.
    """
    tried = [found for found in results if (found["kind"], found["method"]) == ("search", method)]
    tried = [found for found in tried if found["rope"] == rope] or tried
    if not tried:
        raise UserError(f"no learning rate of {method} was tried: run the stage search first")
    return min(tried, key=validation_loss)["rate"]


def validation_loss(result: dict) -> float:
    """NaN, a diverged run, counts as infinite."""
    losses = [m["loss"] for by in result["validation"].values() for m in by.values()]
    mean = sum(losses) / len(losses)
    return mean if mean == mean else float("inf")


def read_results(folder: Path) -> list[dict]:
    path = folder / RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(options: argparse.Namespace, runs: list[Run]) -> None:
    """Whatever of the runs has no result yet; results are written as they come."""
    if not (options.folder / "teacher" / "config.json").exists():
        raise UserError(f"{options.folder} holds no teacher: run the stage pretrain first")
    known = {found["key"] for found in read_results(options.folder)}
    todo = [run for run in runs if run.key not in known]
    # seed by seed, so that methods lack the same ones where time runs out; of a seed the longest
    # first, so that none is left alone at the end
    todo.sort(key=lambda run: (run.seed, not (run.method in METHODS and METHODS[run.method].long)))
    study = (options.folder, options.domain, options.device, options.shrink)
    start, failed = time.monotonic(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    context = multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    with (
        Progress(*columns, TimeElapsedColumn()) as bar,
        open(options.folder / RESULTS, "a", buffering=1) as file,
        ProcessPoolExecutor(options.workers, context, _start, (study, number)) as pool,
    ):
        task = bar.add_task(options.stage, total=len(todo))
        futures = {pool.submit(_work, run, start + options.seconds): run for run in todo}
        for future in as_completed(futures):
            bar.advance(task)
            try:
                result = future.result()
            except Exception as error:
                failed += 1
                bar.console.print(f"{futures[future].key}: {error!r}")
                continue
            if result is not None:
                file.write(json.dumps(result) + "\n")
                bar.console.print(f"{time.monotonic() - start:6.0f} s  {_summary(result)}")
    if failed:
        raise UserError(f"{failed} of {len(todo)} runs failed; the same command tries them again")


_study: Study


def _start(study: tuple, number) -> None:
    """Make ready a worker; workers take the GPUs in turn."""
    global _study
    with number.get_lock():
        own, number.value = number.value, number.value + 1
    if torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(own % torch.cuda.device_count())
    _study = Study(*study)


def _work(run: Run, deadline: float) -> dict | None:
    return execute(_study, run) if time.monotonic() < deadline else None


def _summary(result: dict) -> str:
    text = result["key"]
    if "validation" in result:
        text += f"  validation {validation_loss(result):.4f}"
    if "seconds_a_step" in result:
        text += f"  {result['seconds_a_step'] * 1e3:.0f} ms a step"
    return text


STAGES = {
    "pretrain": pretrain,
    "search": search,
    "final": final,
    "timing": timing,
    "report": report,
}

if __name__ == "__main__":
    main()
