"""What a token store is made from: documents in a fixed order, and what identifies them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator


class DocumentDigest:
    """A sha256 of documents in their order."""

    def __init__(self):
        self._digest = hashlib.sha256()

    def add(self, document: str) -> None:
        """Add the next document."""
        data = document.encode()
        self._digest.update(len(data).to_bytes(8, "little"))
        self._digest.update(data)

    def hexdigest(self) -> str:
        """Return the digest of the documents so far."""
        return self._digest.hexdigest()


class DocumentSource(ABC):
    """Documents that can be read again and again.

    Attributes:
        files: identifies the documents without reading them, for example by the files that they
            are in.
    """

    files: str
    _content: str | None = None

    @abstractmethod
    def read(self, advance: Callable[[int], object] | None) -> Iterator[str]:
        """Yield the documents.

        Args:
            advance: called with the number of bytes that were just read, for a progress bar.
        """

    def documents(self, advance: Callable[[int], object] | None = None) -> Iterator[str]:
        """Yield the documents, as ``read``, and compute ``content`` meanwhile."""
        digest = DocumentDigest()
        for document in self.read(advance):
            digest.add(document)
            yield document
        self._content = digest.hexdigest()

    @property
    def content(self) -> str:
        """The identity of the documents; they are read if they have not been."""
        if self._content is None:
            for _ in self.documents():
                pass
        assert self._content is not None
        return self._content

    def has_fingerprint(self, content: str, files: str) -> bool:
        """Whether recorded identities are of these documents, even if their files have moved."""
        return files == self.files or content == self.content

    def difference(self, origin: dict | None) -> str | None:
        """Return in words how the documents differ from those of a recorded origin, if known."""
        return None
