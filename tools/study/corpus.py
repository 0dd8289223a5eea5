"""Build the text of the restoration study from the files of this machine; download nothing.

    python -m tools.study.corpus --output STUDY/corpus --native-window 512

The corpus has four clearly different domains, of at most --megabytes each:

  python      sources of the standard library and the installed packages, without long docstrings
  c           C, C++ and CUDA headers and sources of the system, CUDA, torch, numpy and others
  prose       documentation (.rst, .md, .txt, descriptions of packages, changelogs), docstrings
  licenses    license and copyright files, by paragraphs

The fifth domain is synthetic: documents of the retrieval tasks (megalard.evaluation.tasks) of up to
--native-window tokens, hidden in neutral sentences or in text of the other domains. Files are
divided into train, validation and test by their paths. A document is left out if earlier documents
of its split contain more than half of it, or documents of another split contain more than a tenth
of it. The tests are collected first.

  OUTPUT/tokenizer/                        a byte-level BPE, trained on train text of all domains
  OUTPUT/DOMAIN/{train,validation,test}/   token stores, for data.paths and evaluation.paths
  OUTPUT/mixed/train/                      all train documents, shuffled, with the synthetic ones
  OUTPUT/corpus.json                       their sizes and checksums

Every document ends with the end token, so runs on these stores need data.eos yes. A domain of which
this machine has too little text is left out, with a warning. The same files, options and versions
give the same corpus.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from megalard import cli
from tools import command_line

# Every byte and the end token, and the largest number of ids that a store keeps in two bytes.
_VOCABULARY = range(257, 2**16 + 1)
# Shorter windows do not hold the documents of all retrieval tasks.
_SMALLEST_WINDOW = 128


def main(arguments: list[str] | None = None) -> int:
    """Build the corpus; return the exit status."""
    options = parse(arguments)
    return cli.run(lambda: run(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_line.make_parser("tools.study.corpus", __doc__)
    at_least, above = command_line.at_least, command_line.above
    command_line.add_output(parser, "a new or empty directory, which holds the corpus")
    parser.add_argument(
        "--roots",
        nargs="+",
        type=_directory,
        metavar="DIR",
        help="directories to search for text (default: this Python's library and packages, the "
        "headers of the system and of CUDA, /usr/share/doc)",
    )
    parser.add_argument(
        "--megabytes",
        type=above(0, float),
        default=48,
        metavar="MB",
        help="text per domain, at most",
    )
    parser.add_argument(
        "--vocab-size",
        type=_vocab_size,
        default=8192,
        metavar="N",
        help="ids of the tokenizer",
    )
    parser.add_argument(
        "--native-window",
        type=at_least(_SMALLEST_WINDOW),
        default=1024,
        metavar="N",
        help="tokens of the longest synthetic document",
    )
    parser.add_argument(
        "--synthetic",
        type=command_line.share,
        default=0.15,
        metavar="SHARE",
        help="share of the tokens of mixed/train that are synthetic",
    )
    parser.add_argument(
        "--tokenizer-megabytes",
        type=above(0, float),
        default=24,
        metavar="MB",
        help="train text, in equal parts from all domains, that the tokenizer is trained on",
    )
    command_line.add_seed(parser, "the shuffle and the synthetic documents")
    command_line.add_workers(parser, os.cpu_count() or 1, "read files and make documents")
    return parser.parse_args(arguments)


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a directory: check its spelling")
    return path


def _vocab_size(text: str) -> int:
    value = int(text)
    if value not in _VOCABULARY:
        raise argparse.ArgumentTypeError(
            f"{value} ids are not possible: give {_VOCABULARY[0]} to {_VOCABULARY[-1]}"
        )
    return value


def run(options: argparse.Namespace) -> None:
    """Build the corpus and print its sizes."""
    from tools.study.corpus_stores import build

    start = time.perf_counter()

    def report(line: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {line}", file=sys.stderr, flush=True)

    print_table(build(options, report))
    print(f"{options.output}: ready after {time.perf_counter() - start:.1f} s")


def print_table(content: dict) -> None:
    """Print the content of ``corpus.json`` as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Corpus")
    for heading in ("domain", "split", "documents", "MB", "tokens", "bytes per token", "sha256"):
        table.add_column(heading, justify="left" if heading in ("domain", "split") else "right")
    for domain, splits in content["domains"].items():
        for split, entry in splits.items():
            size = entry.get("bytes")
            table.add_row(
                domain,
                split,
                f"{entry['documents']:,}",
                "" if size is None else f"{size / 1e6:.2f}",
                f"{entry['tokens']:,}",
                "" if size is None else f"{size / entry['tokens']:.2f}",
                entry["sha256"][:12],
            )
        table.add_section()
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
