"""Compare the tokenization of a text with that of the package datasets, in one run.

    pip install datasets
    python -m tools.bench.tokenize --model MODEL text/ --json tokenize.json

Both read the same files with the same tokenizer and write all tokens to the disk. megalard writes a
token store with checksums. `datasets` loads the files, maps the tokenizer over batches of 1000
documents, once with the threads of the tokenizer and once with one process per core, and saves the
result. Each is run --repeats times in turns, and the fastest run counts, with the CPU time of that
run over all processes. The numbers of tokens must be equal.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megalard import cli
from tools import command_line


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = command_line.make_parser("tools.bench.tokenize", __doc__)
    parser.add_argument("text", type=Path, metavar="FILE", help="a .jsonl file with the key text")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="its tokenizer")
    command_line.add_repeats(parser, 3)
    command_line.add_json(parser)
    options = parser.parse_args(arguments)
    return cli.run(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure and print a table."""
    import torch

    from tools.bench.results import Table, describe_environment, print_environment, write_json

    environment = describe_environment(torch.device("cpu"))
    print_environment(environment)
    ways: dict[str, Callable[[Path], int]] = {
        "megalard prepare": lambda folder: _ours(options, folder),
        "datasets, threads": lambda folder: _theirs(options, folder, None),
        "datasets, processes": lambda folder: _theirs(options, folder, os.cpu_count()),
    }
    seconds: dict[str, tuple[float, float]] = {}
    tokens: dict[str, int] = {}
    for _ in range(options.repeats):
        for name, tokenize in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                start, cpu_start = time.perf_counter(), _cpu_seconds()
                tokens[name] = tokenize(Path(folder))
                taken = time.perf_counter() - start, _cpu_seconds() - cpu_start
            seconds[name] = min(taken, seconds.get(name, taken))
    assert len(set(tokens.values())) == 1, f"the numbers of tokens differ: {tokens}"
    count = next(iter(tokens.values()))
    print(f"{options.text}: {options.text.stat().st_size:,} bytes, {count:,} tokens\n")
    table = Table(("", 20), "s", "CPU s", "tokens/s", "relative")
    first, _ = next(iter(seconds.values()))
    for name, (taken, cpu) in seconds.items():
        cells = (f"{taken:.2f}", f"{cpu:.2f}", f"{count / taken:,.0f}", f"{first / taken:.2f}")
        table.row(name, *cells)
    if options.json:
        result = {"tokens": count, "seconds": seconds}
        write_json(options.json, environment, options, [result], cores=os.cpu_count())


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of those that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _ours(options: argparse.Namespace, folder: Path) -> int:
    from megalard.data.boundaries import Boundaries
    from megalard.data.token_store_writer import build_store
    from megalard.data.tokenizer import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = load_tokenizer(options.model)
    none = Boundaries((), ())
    return len(build_store([options.text], tokenizer, folder / "s", boundaries=none).tokens)


def _theirs(options: argparse.Namespace, folder: Path, processes: int | None) -> int:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if processes is None else "false"
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(batch: dict) -> dict:
        return {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    loaded = datasets.load_dataset(
        "json", data_files=str(options.text), split="train", cache_dir=str(folder / "cache")
    )
    mapped = loaded.map(
        encode,
        batched=True,
        num_proc=processes,
        remove_columns=loaded.column_names,
        load_from_cache_file=False,
    )
    mapped.save_to_disk(str(folder / "saved"))
    total = sum(len(ids) for ids in mapped.with_format("numpy")["ids"])
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return total


if __name__ == "__main__":
    sys.exit(main())
