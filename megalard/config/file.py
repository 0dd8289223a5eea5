"""Reading a configuration: a YAML file, ``--section.key value`` overrides, help for every key."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from pathlib import Path

import yaml

from megalard.config.rules import RELATIONS, validate
from megalard.config.schema import Config, StreamConfig
from megalard.errors import UserError


class _OneOfEach(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} is given twice {node.start_mark}".strip())
        return super().construct_mapping(node, deep)


def load_config(path: str | None, overrides: list[str]) -> Config:
    """Read a YAML file and apply ``--section.key value`` overrides.

    Raises:
        UserError: unreadable file, unknown key (the nearest known one is named), wrong type, or a
            value out of range.
    """
    tree: dict = {}
    if path is not None:
        try:
            tree = yaml.load(Path(path).read_text(encoding="utf-8"), _OneOfEach) or {}
        except OSError as error:
            raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{path} must hold sections such as 'model:' and 'data:'")
    for key, value in _pairs(overrides):
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                raise UserError(f"--{key}: '{section}' is a value, not a section")
        node[last] = value if _is_text(key, value) else _parse(value)
    _complete_streams(tree)
    config = _build(Config, tree, "")
    validate(config)
    return config


def _complete_streams(tree: dict) -> None:
    """Give each stream the values it takes from other sections, in place.

    Raises:
        UserError: a value stands where streams would take it from, and none does.
    """
    streams = tree.get("streams")
    if streams is None:
        tree.pop("streams", None)
    if not isinstance(streams, dict) or not streams:
        return
    if tree.get("objective"):
        raise UserError("objective and streams are both given: say each stream's objective there")
    optimizer = tree.get("optimizer")
    optimizer = optimizer if isinstance(optimizer, dict) else {}
    batches = {key: optimizer[key] for key in _STREAM_BATCHES if optimizer.get(key) is not None}
    shared = {"data": tree.get("data") or {}, **batches}
    own = [stream for stream in streams.values() if isinstance(stream, dict)]
    for key in batches:
        _require_taken(f"optimizer.{key}", key, [key in stream for stream in own])
    if isinstance(shared["data"], dict):
        of_streams = [stream.get("data") or {} for stream in own]
        for key in shared["data"]:
            given = [isinstance(data, dict) and key in data for data in of_streams]
            _require_taken(f"data.{key}", f"data.{key}", given)
    base = {**shared, "objective": {"relations": dict.fromkeys(RELATIONS, 0.0)}}
    tree["streams"] = {
        str(name): _merged(base, stream or {}) if isinstance(stream, dict | None) else stream
        for name, stream in streams.items()
    }


def _require_taken(key: str, own_key: str, given: list[bool]) -> None:
    if given and all(given):
        raise UserError(
            f"{key} is given, but every stream gives its own: set streams.NAME.{own_key} instead"
        )


_STREAM_BATCHES = ("global_batch", "micro_batch")


def _merged(base: dict, over: dict) -> dict:
    """``over``'s values, and ``base``'s where it has none; sections are merged key by key."""
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict | None):
            merged[key] = _merged(base[key], over[key] or {})
    return merged


def describe_keys() -> str:
    """Every key with its meaning and default, for ``--help``."""
    return "\n".join(_describe(Config, "--"))


def _describe(cls, prefix: str) -> list[str]:
    lines, meanings = [], _meanings(cls)
    for item in dataclasses.fields(cls):
        default = (
            item.default if item.default is not dataclasses.MISSING else item.default_factory()
        )
        if dataclasses.is_dataclass(default):
            lines += _describe(type(default), f"{prefix}{item.name}.")
            continue
        if isinstance(default, dict):
            lines.append(f"  {prefix}{item.name}  (default: none)")
            own = inspect.getdoc(StreamConfig).partition("\n\n")[2]
            about = f"{meanings.get(item.name, '')} {own}"
            lines += textwrap.wrap(" ".join(about.split()), 90, **_INDENT)
            lines += _describe_stream(f"{prefix}{item.name}.NAME.")
        else:
            lines.append(f"  {prefix}{item.name}  (default: {default})")
            lines += textwrap.wrap(meanings.get(item.name, ""), 90, **_INDENT)
    return lines


def _describe_stream(prefix: str) -> list[str]:
    """A stream's own keys; its ``objective`` and ``data`` have those of the sections."""
    lines = [f"  {prefix}objective.KEY, {prefix}data.KEY  (as in those sections)"]
    meanings = _meanings(StreamConfig)
    for item in dataclasses.fields(StreamConfig):
        if item.default is not dataclasses.MISSING:
            batch = item.name in _STREAM_BATCHES
            default = f"that of --optimizer.{item.name}" if batch else item.default
            lines.append(f"  {prefix}{item.name}  (default: {default})")
            lines += textwrap.wrap(meanings[item.name], 90, **_INDENT)
    return lines


_INDENT = {"initial_indent": " " * 8, "subsequent_indent": " " * 8}


def _meanings(cls) -> dict[str, str]:
    """Field name to the string that follows it in the class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        before.target.id: " ".join(after.value.value.split())
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


def _pairs(overrides: list[str]):
    position = 0
    while position < len(overrides):
        word = overrides[position]
        if not word.startswith("--"):
            raise UserError(f"expected --section.key value, got '{word}'")
        key, equals, value = word[2:].partition("=")
        if not equals:
            position += 1
            if position == len(overrides):
                raise UserError(f"--{key} needs a value: only --preflight and --help take none")
            value = overrides[position]
        yield key, value
        position += 1


def _parse(value: str):
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _is_text(key: str, value: str) -> bool:
    """Whether the key holds text, which is taken as typed: a path may look like a number or date.

    ``null`` leaves out what may be left out.
    """
    hint = Config
    for name in key.split("."):
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        else:
            hint = typing.get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return hint is str or (hint == str | None and value not in ("null", "~", ""))


def _nearest(key: str, known: set[str], prefix: str) -> str:
    """The known key that ``key`` was most likely meant to be: here, else in any section."""
    everywhere = {path.rpartition(".")[2]: path for path in _paths(Config, "")}
    if key in everywhere:
        return everywhere[key]
    here = difflib.get_close_matches(key, known, n=1)
    elsewhere = [] if here else difflib.get_close_matches(key, everywhere, n=1)
    if elsewhere:
        return everywhere[elsewhere[0]]
    return prefix + (here or difflib.get_close_matches(key, known, n=1, cutoff=0.0))[0]


def _paths(cls, prefix: str) -> list[str]:
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        paths += _paths(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else []
        paths.append(prefix + name)
    return paths


def _build(cls, tree, prefix: str):
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"'{prefix.rstrip('.')}' is a section, got the value {tree!r}")
    hints = typing.get_type_hints(cls)
    known = {item.name for item in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in known:
            near = _nearest(str(key), known, prefix)
            raise UserError(f"unknown key '{prefix}{key}'; the nearest known one is '{near}'")
        values[key] = _convert(hints[key], value, f"{prefix}{key}")
    return cls(**values)


def _convert(hint, value, key: str):
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise UserError(f"'{key}' is a section of named entries, got the value {value!r}")
        item_hint = typing.get_args(hint)[1]
        return {
            str(name): _convert(item_hint, item, f"{key}.{name}") for name, item in value.items()
        }
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        (item_hint,) = typing.get_args(hint)
        return [_convert(item_hint, item, key) for item in items]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML 1.1 reads 2e-5 as text
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{key} must be of type {hint.__name__}, got {value!r}")
