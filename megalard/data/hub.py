"""Documents of a Hugging Face data set, by its name on the hub or from a directory, streamed.

A directory that ``datasets`` has saved with ``save_to_disk`` has .arrow files, which
``megalard.data.sources`` reads like other files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalard.data.document_source import DocumentSource
from megalard.data.formats import Column
from megalard.errors import UserError, reason_of


class HubText(DocumentSource):
    """The documents of one split of a data set, as the text of a token store.

    Args:
        name: the name on the hub, such as ``owner/name``, or a local directory.
        column: where a row has its document. If the data set has no such column but a single one
            that can be meant, that one is read.
        subset: the configuration of the data set; None for its default.
        split: the split.
        revision: a branch, a tag or a commit; None for the newest commit.

    Attributes:
        column: the column that is read.
        origin: the name, the subset, the split and the commit, as JSON takes them.
        files: a sha256 of ``origin``, the column and, for a directory, its files.

    Raises:
        UserError: the package is missing, or the data set cannot be found or has no such column.
    """

    def __init__(
        self,
        name: str,
        column: Column,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
    ):
        self.name = name
        commit = None if Path(name).is_dir() else self._commit(revision)
        self._rows = self._open(subset, split, commit)
        self.column = self._choose(column)
        self.origin = {"dataset": name, "subset": subset, "split": split, "revision": commit}
        key = [self.origin, self.column.key, self.column.identity]
        if commit is None:
            key.append(_files_of(Path(name)))
        self.files = hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def read(self, advance: Callable[[int], object] | None) -> Iterator[str]:
        """Yield the documents, without those of white space."""
        is_empty, number = True, 0
        rows = iter(self._rows)
        while (row := self._try(lambda: next(rows, None))) is not None:
            number += 1
            where = f"data set {self.name} row {number} under {self.column.key!r}"
            document = self.column.document(row[self.column.key], where)
            if document.strip():
                is_empty = False
                yield document
                if advance is not None:
                    advance(len(document.encode()))
        if is_empty:
            raise UserError(f"there is no text in the data set {self.name}: choose another split")

    def has_fingerprint(self, content: str, files: str) -> bool:
        """Whether recorded identities are of this text, which is not read for that."""
        return files == self.files or (self._content is not None and content == self._content)

    def difference(self, origin: dict[str, Any] | None) -> str | None:
        """Return in words how the data set differs from a recorded origin; None if unknown."""
        is_other = origin is None or {**origin, "revision": 0} != {**self.origin, "revision": 0}
        if is_other or origin["revision"] == self.origin["revision"]:
            return None
        return (
            f"from the revision {origin['revision']} of the data set {self.name}, which is now at "
            f"{self.origin['revision']} (--revision {origin['revision']} opens it again)"
        )

    def _commit(self, revision: str | None) -> str | None:
        from huggingface_hub import HfApi

        return self._try(lambda: HfApi().dataset_info(self.name, revision=revision).sha)

    def _open(self, subset: str | None, split: str, commit: str | None):
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"the data set {self.name} needs the package datasets: install it with "
                "pip install 'megalard[datasets]'"
            ) from error
        options: dict[str, Any] = {"split": split, "revision": commit, "streaming": True}
        return self._try(lambda: datasets.load_dataset(self.name, subset, **options))

    def _choose(self, column: Column) -> Column:
        features = self._rows.features
        if features is None:
            first = self._try(lambda: next(iter(self._rows)))
            kinds = {key: _kind_of_value(value) for key, value in first.items()}
        else:
            kinds = {key: _kind_of_feature(feature) for key, feature in features.items()}
        if column.key in kinds:
            return column
        wanted = "text" if column.identity is None else "list"
        possible = [key for key, kind in kinds.items() if kind == wanted]
        if len(possible) != 1:
            raise column.missing(f"the data set {self.name}", "column", list(kinds))
        return replace(column, key=possible[0])

    def _try(self, function: Callable[[], Any]) -> Any:
        """Call into the packages, whose errors are of many types."""
        try:
            return function()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"the data set {self.name} cannot be read ({reason_of(error)}): check its name, "
                "--subset, --split, --revision, and the network or HF_HUB_OFFLINE"
            ) from error


def _kind_of_value(value: object) -> str:
    """Return ``text``, ``list`` or an empty string."""
    return "text" if isinstance(value, str) else "list" if isinstance(value, list) else ""


def _kind_of_feature(feature: Any) -> str:
    """Return the same for the type of a column; a list of messages is a list, or a List."""
    if getattr(feature, "dtype", "") in ("string", "large_string"):
        return "text"
    is_list = isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList")
    return "list" if is_list else ""


def _files_of(directory: Path) -> list:
    """Return path, size and modification time of every file of a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(directory)), path.stat()) for path in files]
    entries = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return [str(directory.resolve()), entries]
