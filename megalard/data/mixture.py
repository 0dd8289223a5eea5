"""Several sources of documents as one text, in given shares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

from megalard.data.document_source import DocumentSource


class MixedText(DocumentSource):
    """The documents of several texts in turns, so that characters have the shares of the weights.

    The next document is of the text that is furthest behind its share. The mixture ends when it
    is the turn of a text that is used up, so that no document is repeated.

    Args:
        texts: the texts.
        weights: a positive number for each text; only their ratios count.

    Attributes:
        files: a sha256 of the identities of the texts and the weights.
    """

    def __init__(self, texts: Sequence[DocumentSource], weights: Sequence[float]):
        self.texts, self.weights = list(texts), [float(weight) for weight in weights]
        assert len(self.texts) == len(self.weights)
        total = sum(self.weights)
        identity = [[text.files for text in texts], [weight / total for weight in self.weights]]
        self.files = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def read(self, advance: Callable[[int], object] | None) -> Iterator[str]:
        """Yield the documents."""
        sources = [text.documents(advance) for text in self.texts]
        shares = [0.0] * len(sources)
        while True:
            number = min(range(len(sources)), key=shares.__getitem__)
            document = next(sources[number], None)
            if document is None:
                return
            shares[number] += len(document) / self.weights[number]
            yield document
