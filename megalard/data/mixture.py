"""Several sources of documents as one text, in given shares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

from megalard.data.sources import Text


class MixedText:
    """The documents of several texts in turns, so that characters have the shares of the weights.

    The next document is of the text that is furthest behind its share. The mixture ends when it
    is the turn of a text that is used up, so that no document is repeated. See
    ``megalard.data.sources.Text`` for the interface.

    Args:
        texts: the texts.
        weights: a positive number for each text; only their ratios count.

    Attributes:
        files: a sha256 of the identities of the texts and the weights.
    """

    def __init__(self, texts: Sequence[Text], weights: Sequence[float]):
        self.texts, self.weights = list(texts), [float(weight) for weight in weights]
        assert len(self.texts) == len(self.weights)
        total = sum(self.weights)
        identity = [[text.files for text in texts], [weight / total for weight in self.weights]]
        self.files = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._content: str | None = None

    def documents(self, advance: Callable[[int], object] | None = None) -> Iterator[str]:
        """Yield the documents, and compute ``content`` meanwhile."""
        digest = hashlib.sha256()
        sources = [text.documents(advance) for text in self.texts]
        shares = [0.0] * len(sources)
        while True:
            number = min(range(len(sources)), key=shares.__getitem__)
            document = next(sources[number], None)
            if document is None:
                break
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
            shares[number] += len(document) / self.weights[number]
            yield document
        self._content = digest.hexdigest()

    @property
    def content(self) -> str:
        """A sha256 of the documents in their order; they are read if they have not been."""
        if self._content is None:
            for _ in self.documents():
                pass
        assert self._content is not None
        return self._content

    def has_fingerprint(self, content: str, files: str) -> bool:
        """Whether recorded identities are of this mixture, even if its files have moved since."""
        return files == self.files or content == self.content
