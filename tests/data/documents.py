"""Documents in memory, with the interface of ``megalard.data.sources.Text``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megalard.data.boundaries import boundaries_of
from megalard.data.document_source import DocumentSource
from megalard.data.token_store import TokenStore
from megalard.data.token_store_writer import write_store
from megalard.data.tokenizer import Tokenizer


class Documents(DocumentSource):
    """Documents that identify themselves by a name.

    Args:
        documents: the documents, or a function that yields them.
        name: another name is another text.
    """

    def __init__(self, documents: Iterable[str] | Callable[[], Iterator[str]], name: str = "text"):
        self._documents, self.files = documents, name

    def read(self, advance: Callable[[int], object] | None) -> Iterator[str]:
        """Yield the documents."""
        yield from self._documents() if callable(self._documents) else self._documents

    @property
    def content(self) -> str:
        """The name."""
        return self.files


def store_of(
    documents: Iterable[str] | Callable[[], Iterator[str]],
    tokenizer: Tokenizer,
    output: Path,
    name: str = "text",
) -> TokenStore:
    """Write a store of documents with the special tokens that the tokenizer puts around a text."""
    text = Documents(documents, name)
    return write_store(text, tokenizer, output, boundaries_of(tokenizer))
