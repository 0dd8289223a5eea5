"""The text of ``--help``: every key with its meaning, its choices or range, and its default."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
import typing
from typing import Any

from megalard.config.fields import allowed_of, default_of, help_texts, type_hints, without_none
from megalard.config.file import STREAM_BATCHES
from megalard.config.recipes import recipes, title
from megalard.config.schema import Config, StageConfig, StreamConfig

_WIDTH = 96

_INTRODUCTION = """\
Every key can stand in the YAML file (--config) and on the command line, as --section.key VALUE or
--section.key=VALUE. The command line wins. A list is written [a, b] (quote it for the shell) or, on
the command line, a b; a section {key: value}. Numbers of tokens may be written as 4K. null removes
a key that the file sets."""


def describe_keys() -> str:
    """Return a description of every key, section by section."""
    lines = [_INTRODUCTION]
    for field in dataclasses.fields(Config):
        default = default_of(field)
        if dataclasses.is_dataclass(default):
            lines += ["", *_heading(field.name, _summary(type(default)))]
            lines += _describe(type(default), f"--{field.name}.")
        else:
            lines += ["", *_describe_entries(field.name, help_texts(Config)[field.name])]
    lines += ["", "recipes, which --config takes by name:"]
    lines += [f"  {name:<24}{title(path)}" for name, path in recipes().items()]
    return "\n".join(lines)


def _summary(cls: type) -> str:
    return " ".join(inspect.getdoc(cls).split())


def _describe(cls: type, prefix: str) -> list[str]:
    lines, texts = [], help_texts(cls)
    hints = type_hints(cls)
    for field in dataclasses.fields(cls):
        default = default_of(field)
        if dataclasses.is_dataclass(default):
            lines += _describe(type(default), f"{prefix}{field.name}.")
            continue
        lines.append(f"  {prefix}{field.name}  {_facts(field, hints[field.name])}")
        lines += _wrap(texts[field.name])
    return lines


def _facts(field: dataclasses.Field, hint: Any) -> str:
    """Return the default and the allowed values of a field, in parentheses."""
    allowed, default = allowed_of(field), default_of(field)
    if allowed.required:
        return "(required)"
    facts = [f"default: {'none' if default in (None, []) else _yaml(default)}"]
    hint, _ = without_none(hint)
    if typing.get_origin(hint) is list:
        (hint,) = typing.get_args(hint)
        facts.append("a list")
    if typing.get_origin(hint) is typing.Literal:
        facts.append(f"{' | '.join(typing.get_args(hint))}")
    if allowed.describe():
        facts.append(allowed.describe())
    return f"({'; '.join(facts)})"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


def _describe_entries(name: str, text: str) -> list[str]:
    """Describe a section of named entries: ``streams`` or ``stages``."""
    cls = {"streams": StreamConfig, "stages": StageConfig}[name]
    lines = _heading(name, f"{text} {_summary(cls)}")
    texts, hints = help_texts(cls), type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    sections = [n for n, field in fields.items() if dataclasses.is_dataclass(default_of(field))]
    keys = ", ".join(f"--{name}.NAME.{section}.KEY" for section in sections)
    lines += textwrap.wrap(
        f"{keys}  (the keys of those sections)",
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
    )
    for key, field in fields.items():
        if key in sections:
            continue
        if key == "streams":
            lines.append(f"  --{name}.NAME.streams.NAME.KEY  (the keys of a stream)")
            continue
        facts = _facts(field, hints[key])
        if name == "streams" and key in STREAM_BATCHES:
            facts = f"(default: the value of --optimizer.{key}; at least 1)"
        lines.append(f"  --{name}.NAME.{key}  {facts}")
        lines += _wrap(texts[key])
    return lines


def _heading(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name}: {text.replace('``', '')}", _WIDTH)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(
        text.replace("``", ""), _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8
    )
