"""The tokenizer and the token stores of the study's corpus."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from megalard.checkpoint.convert import check_target
from megalard.data.boundaries import boundaries_of
from megalard.data.document_source import DocumentSource
from megalard.data.token_store import TOKENS, TokenStore
from megalard.data.token_store_writer import write_store
from megalard.data.tokenizer import Tokenizer, load_tokenizer
from megalard.errors import UserError
from tools.quickstart.byte_bpe import save_tokenizer, train_tokenizer
from tools.study.collection import Corpus, collect
from tools.study.documents import SPLITS, Document, default_roots
from tools.study.synthetic_text import generate
from tools.study.workers import parallel_map

Report = Callable[[str], object]

# A domain with less text in one of its splits is left out.
LEAST_BYTES = {"train": 200_000, "validation": 10_000, "test": 40_000}
# Tokens of the synthetic validation and test documents, enough for a loss.
_SYNTHETIC_TOKENS = 100_000
SYNTHETIC = "synthetic"


class GivenDocuments(DocumentSource):
    """Documents in memory that identify themselves by a name."""

    def __init__(self, documents: Iterable[str], identity: str):
        self._documents, self.files = documents, identity

    def read(self, advance: Callable[[int], object] | None) -> Iterator[str]:
        """Yield the documents."""
        yield from self._documents

    @property
    def content(self) -> str:
        """The name."""
        return self.files


def build(options: argparse.Namespace, report: Report) -> dict:
    """Build the corpus; return the content of ``corpus.json``.

    Args:
        options: the options of ``tools.study.corpus``.
        report: called with a line about each finished part.

    Raises:
        UserError: the output directory is not empty or cannot be written, or there is not enough
            text.
    """
    check_target(options.output)
    roots = options.roots or default_roots()
    size = round(options.megabytes * 1e6)
    corpus = large_domains(collect(roots, size, options.workers, report), report)

    sample = tokenizer_sample(corpus, round(options.tokenizer_megabytes * 1e6))
    folder = options.output / "tokenizer"
    window, vocab_size = options.native_window, options.vocab_size
    save_tokenizer(train_tokenizer(sample, vocab_size, window, single_digits=True), folder)
    tokenizer = load_tokenizer(folder)
    report(f"tokenizer of {tokenizer.vocab_size} ids")

    entries: dict[str, dict[str, dict]] = {}
    trains = []
    for domain, splits in corpus.items():
        entries[domain], tokens = {}, 0
        for split, documents in splits.items():
            store = write_texts(
                [document.text for document in documents],
                tokenizer,
                options.output / domain / split,
            )
            entries[domain][split] = describe(store) | describe_sources(documents)
            tokens += len(store.tokens)
            trains += [store] if split == "train" else []
        report(f"{domain}: {tokens:,} tokens")

    synthetic = write_synthetic(options, tokenizer, trains)
    entries[SYNTHETIC] = {split: describe(store) for split, store in synthetic.items()}
    tokens = sum(len(store.tokens) for store in synthetic.values())
    report(f"{SYNTHETIC}: {tokens:,} tokens")
    trains += [synthetic["train"]] if "train" in synthetic else []
    mixed = write_tokens(
        shuffled_documents(trains, options.seed),
        tokenizer,
        options.output / "mixed" / "train",
        f"mixed, seed {options.seed}",
    )
    entries["mixed"] = {"train": describe(mixed)}
    content = {
        "options": {
            "megabytes": options.megabytes,
            "vocab_size": options.vocab_size,
            "native_window": options.native_window,
            "synthetic": options.synthetic,
            "seed": options.seed,
            "roots": [str(root) for root in roots],
        },
        "tokenizer": tokenizer.fingerprint,
        "domains": entries,
    }
    (options.output / "corpus.json").write_text(json.dumps(content, indent=2) + "\n")
    return content


def large_domains(corpus: Corpus, report: Report) -> Corpus:
    """Return the domains that have enough text in every split.

    Raises:
        UserError: there are fewer than two.
    """
    kept = {}
    for domain, splits in corpus.items():
        sizes = {split: sum(d.size for d in documents) for split, documents in splits.items()}
        short = [split for split in SPLITS if sizes[split] < LEAST_BYTES[split]]
        if short:
            report(
                f"warning: the domain {domain} is left out, because its {short[0]} text has "
                f"{sizes[short[0]]} bytes and {LEAST_BYTES[short[0]]} are needed"
            )
        else:
            kept[domain] = splits
    if len(kept) < 2:
        raise UserError(
            f"the directories have enough text of {len(kept)} domain{'s' * (not kept)}, and a "
            "study needs two: give more --roots, or more --megabytes"
        )
    return kept


def tokenizer_sample(corpus: Corpus, size: int) -> Iterator[str]:
    """Yield train text of ``size`` bytes, as much of each domain."""
    for splits in corpus.values():
        remaining = size // len(corpus)
        for document in splits["train"]:
            if remaining <= 0:
                break
            yield document.text
            remaining -= document.size


def write_texts(
    texts: list[str], tokenizer: Tokenizer, folder: Path, end_token: str | None = None
) -> TokenStore:
    """Write a token store of documents, each of which ends with the end token.

    Args:
        end_token: the text of the end token; the tokenizer's EOS when not given.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return _write(texts, tokenizer, folder, digest.hexdigest(), end_token)


def write_tokens(
    documents: Iterable[np.ndarray], tokenizer: Tokenizer, folder: Path, identity: str
) -> TokenStore:
    """Write a token store of documents that are tokens already."""
    # A document is the text of its tokens as JSON.
    texts = (json.dumps(row.tolist()) for row in documents)
    as_given = replace(tokenizer, encode_batch=lambda rows: [json.loads(row) for row in rows])
    return _write(texts, as_given, folder, identity)


def _write(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: Path,
    identity: str,
    end_token: str | None = None,
) -> TokenStore:
    boundaries = boundaries_of(tokenizer, eos="yes", end_token=end_token)
    return write_store(GivenDocuments(documents, identity), tokenizer, folder, boundaries)


def write_synthetic(
    options: argparse.Namespace, tokenizer: Tokenizer, trains: list[TokenStore]
) -> dict[str, TokenStore]:
    """Write the stores of synthetic documents; a split without any token has no store."""
    share = options.synthetic / (1 - options.synthetic)
    train_tokens = round(share * sum(len(store.tokens) for store in trains))
    wanted = {"train": train_tokens, "validation": _SYNTHETIC_TOKENS, "test": _SYNTHETIC_TOKENS}
    stores, window = {}, options.native_window
    with parallel_map(options.workers) as map_in_parallel:
        for number, (split, tokens) in enumerate(wanted.items()):
            if tokens == 0:
                continue
            documents = generate(
                options.output / "tokenizer",
                [store.path for store in trains],
                len(wanted) * options.seed + number,
                window,
                tokens,
                map_in_parallel,
            )
            identity = f"{SYNTHETIC} {split}, seed {options.seed}, window {window}"
            folder = options.output / SYNTHETIC / split
            stores[split] = write_tokens(documents, tokenizer, folder, identity)
    return stores


def shuffled_documents(stores: list[TokenStore], seed: int) -> Iterator[np.ndarray]:
    """Yield all documents of several stores in random order, without their end tokens."""
    counts = [len(store.documents) - 1 for store in stores]
    origin = np.repeat(np.arange(len(stores)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    for place in np.random.default_rng(seed).permutation(len(origin)):
        store, row = stores[origin[place]], number[place]
        yield store.read(int(store.documents[row]), int(store.documents[row + 1]) - 1)


def describe(store: TokenStore) -> dict:
    """Return the entry of a store in ``corpus.json``."""
    return {
        "documents": len(store.documents) - 1,
        "tokens": len(store.tokens),
        "sha256": hashlib.sha256((store.path / TOKENS).read_bytes()).hexdigest(),
    }


def describe_sources(documents: list[Document]) -> dict:
    """Return the further entries of a store whose text comes from files."""
    sources = "\n".join(document.source for document in documents)
    return {
        "bytes": sum(document.size for document in documents),
        "sources_sha256": hashlib.sha256(sources.encode()).hexdigest(),
    }
