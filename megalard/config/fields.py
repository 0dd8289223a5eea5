"""Fields of the configuration: a default, the values that are allowed, and what the field means.

A field states its own range or its choices, so that one loop checks all of them and ``--help``
prints them:

    steps: int = setting(144, at_least=1)
    \"\"\"Number of optimizer steps.\"\"\"
    device: Literal["auto", "cpu", "cuda"] = setting("auto")
    \"\"\"...\"\"\"

The string after a field is its help text.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any

from megalard.errors import UserError, shown

# JSON readers keep whole numbers exact up to here.
LARGEST_INT = 2**53
# Products of several settings must stay finite in fp32.
LARGEST_FLOAT = 1e30
_PATH_CHARACTERS, _NAME_BYTES = 4096, 255


@dataclass(frozen=True)
class Allowed:
    """The values a field may have; for a list, the values of each item.

    Attributes:
        at_least, above: lower bound, included and excluded.
        at_most, below: upper bound, included and excluded.
        required: what to give, for a field that must be set because no default is useful.
        distinct: no item of the list may occur twice.
        length: number of items of the list; None for any number from 1 on.
        may_be_empty: the list may have no item.
        path: the field names a file or directory.
        tokens: the field is a number of tokens, which may be written as 4K.
        extra: facts for the code that uses the field.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    required: str | None = None
    distinct: bool = False
    length: int | None = None
    may_be_empty: bool = False
    path: bool = False
    tokens: bool = False
    extra: Any = None

    def problem(self, value: float) -> str | None:
        """Return what a number must be, such as ``at least 1``; None if it is allowed."""
        # In this order, because isfinite raises OverflowError for a huge int.
        if abs(value) > LARGEST_FLOAT or not math.isfinite(value):
            return "a finite number"
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            return f"at most {LARGEST_INT}"
        if self.at_least is not None and value < self.at_least:
            return f"at least {self.at_least}"
        if self.above is not None and value <= self.above:
            return f"greater than {self.above}"
        if self.at_most is not None and value > self.at_most:
            return f"at most {self.at_most}"
        if self.below is not None and value >= self.below:
            return f"less than {self.below}"
        return None

    def describe(self) -> str:
        """Return the range in words for ``--help``; empty without a range."""
        low, high = "", ""
        if self.at_least is not None:
            low = f"at least {self.at_least}"
        elif self.above is not None:
            low = f"greater than {self.above}"
        if self.at_most is not None:
            high = f"at most {self.at_most}"
        elif self.below is not None:
            high = f"less than {self.below}"
        return " and ".join(filter(None, (low, high)))


def setting(default: Any, **allowed: Any) -> Any:
    """Declare a field of the configuration with its default and its allowed values.

    Args:
        default: the default; a list or dictionary is copied for every instance.
        allowed: attributes of ``Allowed``.
    """
    metadata = {"allowed": Allowed(**allowed)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """Declare a field that is a section with fields of its own."""
    return dataclasses.field(default_factory=cls)


def allowed_of(field: dataclasses.Field) -> Allowed:
    """Return the allowed values of a field."""
    return field.metadata.get("allowed", Allowed())


def default_of(field: dataclasses.Field) -> Any:
    """Return a field's default value."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def help_texts(cls: type) -> dict[str, str]:
    """Return the help text of every field of a class: the string that follows it in the source."""
    statements: Any = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    texts = {}
    for before, after in itertools.pairwise(statements.body):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and is_text:
            texts[before.target.id] = " ".join(str(after.value.value).split())
    return texts


def type_hints(cls: Any) -> dict[str, Any]:
    """Return the type of every field of a class; the caller must not change the dictionary."""
    return _type_hints(cls)


_type_hints = cache(typing.get_type_hints)


def without_none(hint: Any) -> tuple[Any, bool]:
    """Return X and True for the type hint ``X | None``, and any other hint with False."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return options[0], True
    return hint, False


def check_fields(section: Any, prefix: str = "", has_files: bool = True) -> None:
    """Check every field of a section, and of the sections in it, against its own range.

    Args:
        has_files: whether the fields that a run requires, which name its files, must be set.

    Raises:
        UserError: a value is not allowed; the message names the key, the value and the range.
    """
    for key, value, hint, allowed in _walk(section, prefix):
        if has_files or not allowed.required or value:
            _check_value(key, value, hint, allowed)


def _walk(section: Any, prefix: str) -> Iterator[tuple[str, Any, Any, Allowed]]:
    hints = type_hints(type(section))
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{key}.")
        elif isinstance(value, dict):
            for name, entry in value.items():
                _check_name(key, name)
                yield from _walk(entry, f"{key}.{name}.")
        else:
            yield key, value, hints[field.name], allowed_of(field)


def _check_name(key: str, name: str) -> None:
    """Refuse a name of a stream or stage that could not be part of a file name."""
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii() or len(name) > 64:
        raise UserError(
            f"{key} has the entry {shown(name)}: a name may have letters, digits, - and _ only, "
            "and at most 64 of them"
        )


def _check_value(key: str, value: Any, hint: Any, allowed: Allowed) -> None:
    hint, optional = without_none(hint)
    if value is None and optional:
        return
    if allowed.required and not value:
        raise UserError(f"{key} is not set: {allowed.required}")
    items = [value]
    if isinstance(value, list):
        items = value
        (hint,) = typing.get_args(hint)
        if not value and allowed.may_be_empty:
            return
        if not value or (allowed.length is not None and len(value) != allowed.length):
            count = "one or more" if allowed.length is None else allowed.length
            raise UserError(f"{key} must have {count} items; got {shown(value)}")
        if allowed.distinct and len(set(value)) < len(value):
            raise UserError(f"{key} must not name an item twice; got {shown(value)}")
    for item in items:
        if typing.get_origin(hint) is typing.Literal:
            choices = typing.get_args(hint)
            if item not in choices:
                raise UserError(
                    f"{key} must be one of {', '.join(map(str, choices))}; got {shown(item)}"
                )
        elif isinstance(item, str):
            _check_text(key, item, allowed.path)
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            problem = allowed.problem(item)
            if problem:
                raise UserError(f"{key} must be {problem}; got {shown(value)}")


def _check_text(key: str, value: str, is_path: bool) -> None:
    """Refuse text that cannot be printed or cannot name a file."""
    if not value.isprintable():
        raise UserError(
            f"{key} has a control character or a byte that is not UTF-8, {shown(value)}: "
            "choose another value"
        )
    if not is_path:
        return
    parts = value.split("/")
    if len(value) > _PATH_CHARACTERS or any(len(p.encode()) > _NAME_BYTES for p in parts):
        raise UserError(
            f"{key} is a path of {len(value)} characters, which no file system takes: "
            "choose a shorter one"
        )
