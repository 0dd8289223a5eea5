"""Builds the text of the restoration study from what this machine carries; downloads nothing.

    python tools/study/corpus.py --output runs/study/corpus

Four clearly different domains, each with the same share of the whole:

  python      sources of the standard library and the installed packages, without long docstrings
  c           C, C++ and CUDA headers and sources: the system's, CUDA's, torch's, numpy's, ...
  prose       documentation (.rst, .md, .txt, package descriptions, changelogs) and docstrings
  licences    licence and copyright files, by paragraphs

and a fifth, synthetic: documents of the retrieval tasks (megalard/evaluation/tasks.py) up to
--native tokens long, among neutral sentences or text of the others. Files are split into train,
validation and test by their paths. What is in earlier documents for more than half (of the same
split) or a tenth (of another) is left out; the tests come first. It writes

  OUTPUT/tokenizer/                           a byte-level BPE, trained on the domains' train text
  OUTPUT/DOMAIN/{train,validation,test}/      token stores, for data.paths and evaluation.paths
  OUTPUT/mixed/train/                         all train documents, shuffled, with the synthetic ones
  OUTPUT/corpus.json                          what is in it

A domain that this machine has too little of is left out, with a warning. The same files, options
and versions give the same corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from tools.study import corpus_text
from tools.study.corpus_text import SPLITS, Document

# below these a split says too little to be worth a domain
LEAST_BYTES = {"train": 200_000, "validation": 10_000, "test": 40_000}
# synthetic documents outside train, in tokens; enough for a loss
SYNTHETIC_TOKENS = 100_000
SYNTHETIC = "synthetic"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="new or empty")
    add(
        "--roots",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="folders to search for text (default: this Python's library and packages, the "
        "system's and CUDA's headers, /usr/share/doc)",
    )
    add("--megabytes", type=float, default=48, metavar="MB", help="at most, of a domain (48)")
    add("--vocab", type=int, default=8192, metavar="N", help="pieces of the tokenizer (8192)")
    add("--native", type=int, default=1024, metavar="N", help="longest synthetic document (1024)")
    add(
        "--synthetic",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="of mixed/train's tokens (0.15)",
    )
    add(
        "--tokenizer-megabytes",
        type=float,
        default=24,
        metavar="MB",
        help="of train text, the domains alike, to train the tokenizer on (24)",
    )
    add(
        "--seed", type=int, default=0, metavar="N", help="of the shuffle and the synthetic text (0)"
    )
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (all cores)")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    from megalard.checkpoint.convert import check_target
    from megalard.errors import UserError

    for name, least in (
        ("megabytes", 0),
        ("tokenizer_megabytes", 0),
        ("workers", 0),
        ("native", 127),
    ):
        if getattr(options, name) <= least:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {getattr(options, name)}: give more than {least}")
    if not 0 <= options.synthetic < 1:
        raise UserError(f"--synthetic is {options.synthetic}: give a share of at least 0, below 1")
    # the bytes and the end token
    if not 257 <= options.vocab <= 1 << 16:
        raise UserError(f"--vocab is {options.vocab}: give 257 to 65536 pieces")
    for root in options.roots or []:
        if not root.is_dir():
            raise UserError(f"--roots has {root}, which is no folder: check its spelling")
    check_target(options.output)


def enough(corpus: dict, say: Callable[[str], object]) -> dict[str, dict[str, list[Document]]]:
    """The domains that are large enough.

    Raises:
        UserError: there are fewer than two.
    """
    from megalard.errors import UserError

    kept = {}
    for domain, splits in corpus.items():
        sizes = {split: sum(d.size for d in documents) for split, documents in splits.items()}
        short = [split for split in SPLITS if sizes[split] < LEAST_BYTES[split]]
        if short:
            say(
                f"warning: the domain {domain} is left out: its {short[0]} text has "
                f"{sizes[short[0]]} bytes of at least {LEAST_BYTES[short[0]]}"
            )
        else:
            kept[domain] = splits
    if len(kept) < 2:
        raise UserError(
            f"the folders hold enough text of {len(kept)} domain{'s' * (not kept)}, and a study "
            "needs two: give more --roots, or more --megabytes"
        )
    return kept


def tokenizer_sample(corpus: dict, size: int) -> Iterator[str]:
    """Train text, as much of each domain, in the order of the corpus."""
    for splits in corpus.values():
        left = size // len(corpus)
        for document in splits["train"]:
            if left <= 0:
                break
            yield document.text
            left -= document.size


def write_tokens(documents: Iterator[np.ndarray], tokenizer, folder: Path, source: str):
    """A token store of documents that are tokens already."""
    from megalard.data.token_store_writer import write_store

    ready = replace(tokenizer, encode_batch=lambda rows: rows)
    return write_store((row.tolist() for row in documents), ready, folder, source)


def mixed_documents(stores: list, seed: int) -> Iterator[np.ndarray]:
    """All documents of several stores in random order, without their end tokens."""
    origin = np.concatenate(
        [np.full(len(store.documents) - 1, place) for place, store in enumerate(stores)]
    )
    number = np.concatenate([np.arange(len(store.documents) - 1) for store in stores])
    for at in np.random.default_rng(seed).permutation(len(origin)):
        store, row = stores[origin[at]], number[at]
        yield store.read(int(store.documents[row]), int(store.documents[row + 1]) - 1)


def describe(store, sources: list[str] | None, size: int | None) -> dict:
    """A store's entry in corpus.json."""
    entry = {
        "documents": len(store.documents) - 1,
        "tokens": len(store.tokens),
        "sha256": hashlib.sha256((store.path / "tokens.bin").read_bytes()).hexdigest(),
    }
    if sources is not None:
        listed = hashlib.sha256("\n".join(sources).encode()).hexdigest()
        entry |= {"bytes": size, "sources_sha256": listed}
    return entry


def build(options: argparse.Namespace, say: Callable[[str], object]) -> dict:
    """Make the corpus; returns what corpus.json holds."""
    from byte_bpe import save_tokenizer, train_tokenizer
    from synthetic_text import generate

    from megalard.data.token_store_writer import write_store
    from megalard.data.tokenizer import load_tokenizer

    check(options)
    roots = options.roots or corpus_text.default_roots()
    size = round(options.megabytes * 1e6)
    corpus = enough(corpus_text.collect(roots, size, options.workers, say), say)

    sample = tokenizer_sample(corpus, round(options.tokenizer_megabytes * 1e6))
    trained = train_tokenizer(sample, options.vocab, options.native, single_digits=True)
    save_tokenizer(trained, options.output / "tokenizer")
    tokenizer = load_tokenizer(options.output / "tokenizer")
    say(f"tokenizer of {tokenizer.vocab_size} pieces")

    stores: dict[str, dict] = {}
    domains: dict[str, dict] = {}
    for domain, splits in corpus.items():
        stores[domain], domains[domain] = {}, {}
        for split, documents in splits.items():
            digest = hashlib.sha256()
            for document in documents:
                digest.update(document.text.encode() + b"\0")
            texts = (document.text for document in documents)
            folder = options.output / domain / split
            store = write_store(texts, tokenizer, folder, digest.hexdigest())
            stores[domain][split] = store
            names = [document.source for document in documents]
            domains[domain][split] = describe(store, names, sum(d.size for d in documents))
        say(f"{domain}: {sum(len(s.tokens) for s in stores[domain].values()):,} tokens")

    train = [splits["train"] for splits in stores.values()]
    share = options.synthetic / (1 - options.synthetic)
    goal = round(share * sum(len(store.tokens) for store in train))
    goals = {"train": goal, "validation": SYNTHETIC_TOKENS, "test": SYNTHETIC_TOKENS}
    domains[SYNTHETIC], synthetic = {}, {}
    for number, (split, tokens) in enumerate(goals.items()):
        if tokens:
            documents = generate(
                options.output / "tokenizer",
                [store.path for store in train],
                3 * options.seed + number,
                options.native,
                tokens,
                options.workers,
            )
            source = f"synthetic {split}, seed {options.seed}, native {options.native}"
            folder = options.output / SYNTHETIC / split
            synthetic[split] = write_tokens(documents, tokenizer, folder, source)
            domains[SYNTHETIC][split] = describe(synthetic[split], None, None)
    say(f"{SYNTHETIC}: {sum(len(store.tokens) for store in synthetic.values()):,} tokens")
    train += [synthetic["train"]] if "train" in synthetic else []
    mixed = write_tokens(
        mixed_documents(train, options.seed),
        tokenizer,
        options.output / "mixed" / "train",
        f"mixed, seed {options.seed}",
    )
    domains["mixed"] = {"train": describe(mixed, None, None)}
    content = {
        "options": {
            "megabytes": options.megabytes,
            "vocab": options.vocab,
            "native": options.native,
            "synthetic": options.synthetic,
            "seed": options.seed,
            "roots": [str(root) for root in roots],
        },
        "tokenizer": tokenizer.fingerprint,
        "domains": domains,
    }
    (options.output / "corpus.json").write_text(json.dumps(content, indent=2) + "\n")
    return content


def print_table(content: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Corpus")
    for heading in ("domain", "split", "documents", "MB", "tokens", "bytes a token", "sha256"):
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


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {line}", file=sys.stderr, flush=True)

    from megalard.errors import UserError

    try:
        content = build(options, say)
    except UserError as error:
        print(f"megalard: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"megalard: interrupted; delete {options.output}", file=sys.stderr)
        return 130
    print_table(content)
    print(f"{options.output}: ready after {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
