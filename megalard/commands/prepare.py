"""Tokenize text ahead of training, into a store that every rank and every later run maps.

  megalard prepare --model MODEL_DIR --output runs/tokens text/ more.jsonl

The paths are .txt, .md and .py files (one document each), .jsonl files (one document per line,
under --text-key) and directories of them. Training tokenizes text by itself. Do it ahead if the
text is large or if many runs share it. An output directory that already is this store is left as it
is; one that holds anything else is refused.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

NAME, HELP = "prepare", "tokenize text ahead of training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="text files or directories"
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
            help=f"whether every document {token} token (auto: as the tokenizer does)",
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
        help="chat: the key names a list of messages (default: messages), of which the model's "
        "chat template makes the text",
    )


def run(options: argparse.Namespace) -> int:
    """Tokenize and report."""
    from megalard.data.chat import boundaries_of_format, column_of
    from megalard.data.token_store_writer import build_store
    from megalard.data.tokenizer import load_tokenizer
    from megalard.reporter import Reporter

    start = time.perf_counter()
    tokenizer = load_tokenizer(options.model)
    boundaries = boundaries_of_format(
        options.format, tokenizer, options.bos, options.eos, options.end_token
    )
    store = build_store(
        options.paths,
        tokenizer,
        options.output,
        column=column_of(options.format, options.text_key, tokenizer),
        boundaries=boundaries,
        warn=Reporter(True).warning,
    )
    Reporter(True).line(
        f"{store.path}: {len(store.tokens)} tokens in {len(store.documents) - 1} documents, "
        f"{store.tokens.dtype}, ready after {time.perf_counter() - start:.1f} s"
    )
    return 0
