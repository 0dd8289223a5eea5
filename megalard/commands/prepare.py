"""Tokenize text ahead of training, into a store that every rank and every later run maps.

  megalard prepare --model MODEL_DIR --output runs/tokens text/ more.jsonl

  megalard prepare --model MODEL_DIR --output runs/tokens --dataset owner/name --split train

The paths are .txt, .md and .py files (one document each), .jsonl, .parquet and .arrow files (one
document per line or row, under --text-key), text files as .gz and .zst, and directories of them.
--dataset reads a data set of the Hugging Face hub, or a directory with one, instead of paths; this
needs the package datasets. The commit that was read is noted in the store. Training tokenizes files
by itself. Do it ahead if the text is large or if many runs share it. All cores tokenize;
TOKENIZERS_PARALLELISM=false takes one. If tokenizing is stopped, the same command goes on.
An output directory that already is this store is left as it is; one that holds anything else is
refused.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

NAME, HELP = "prepare", "tokenize text ahead of training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="text files or directories"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="one number for each path, after the paths: its share of the characters. Reading "
        "stops when one path is used up (default: everything is read)",
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="a data set of the hub, or a directory of one"
    )
    parser.add_argument("--subset", metavar="NAME", help="configuration of the data set")
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="split of the data set (default: train)"
    )
    parser.add_argument(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of the data set (default: its newest commit)",
    )
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="DIR",
        help="the model's Hugging Face directory, whose tokenizer is used",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="the token store to write"
    )
    for name, token in (("bos", "begins with the BOS"), ("eos", "ends with the end")):
        parser.add_argument(
            f"--{name}",
            choices=("auto", "yes", "no"),
            default="auto",
            help=f"whether every document {token} token; auto: as the tokenizer does "
            "(default: auto)",
        )
    parser.add_argument(
        "--end-token",
        metavar="TOKEN",
        help="--eos yes: the end token, where it is not the tokenizer's EOS",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="key of the text in .jsonl files, or its column in tables (default: text)",
    )
    parser.add_argument(
        "--format",
        choices=("text", "chat"),
        default="text",
        help="chat: the key names a list of messages, which is messages without --text-key, and "
        "the model's chat template makes the text of it (default: text)",
    )


def run(options: argparse.Namespace) -> int:
    """Tokenize and report."""
    from megalard.data.chat import boundaries_of_format, column_of
    from megalard.data.hub import HubText
    from megalard.data.token_store_writer import build_store, open_or_write
    from megalard.data.tokenizer import load_tokenizer
    from megalard.errors import UserError
    from megalard.reporter import Reporter

    if bool(options.paths) == (options.dataset is not None):
        raise UserError("give either text files or directories, or --dataset")
    if options.dataset is None and (options.subset or options.revision or options.split != "train"):
        raise UserError("--subset, --split and --revision need --dataset")
    if options.weights is not None and (
        len(options.weights) != len(options.paths) or not all(0 < w < 1e30 for w in options.weights)
    ):
        raise UserError("--weights needs one number above 0 for each path")
    reporter, start = Reporter(True), time.perf_counter()
    tokenizer = load_tokenizer(options.model)
    boundaries = boundaries_of_format(
        options.format, tokenizer, options.bos, options.eos, options.end_token
    )
    column = column_of(options.format, options.text_key, tokenizer)
    was_there = options.output.exists()
    if options.dataset is None:
        store = build_store(
            options.paths,
            tokenizer,
            options.output,
            column=column,
            boundaries=boundaries,
            weights=options.weights,
            warn=reporter.warning,
        )
    else:
        text = HubText(options.dataset, column, options.subset, options.split, options.revision)
        revision = text.origin["revision"]
        at = f" at {revision}" if revision else ""
        reporter.line(f"data set {options.dataset}{at}, column {text.column.key}")
        store = open_or_write(text, tokenizer, options.output, boundaries)
    seconds = time.perf_counter() - start
    rate = "" if was_there else f" ({len(store.tokens) / seconds:,.0f} tokens/s)"
    reporter.line(
        f"{store.path}: {len(store.tokens)} tokens in {len(store.documents) - 1} documents, "
        f"{store.tokens.dtype}, ready after {seconds:.1f} s{rate}"
    )
    return 0
