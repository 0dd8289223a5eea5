"""Read a configuration: a YAML file, then ``--section.key value`` overrides."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

from megalard.config.fields import allowed_of, type_hints, without_none
from megalard.config.lengths import parse_length
from megalard.config.objective import RELATIONS
from megalard.config.recipes import find_config
from megalard.config.rules import validate
from megalard.config.schema import Config
from megalard.config.yaml_text import parse_file, parse_value
from megalard.errors import UserError, shown

# Old spelling of a key, under any section, and the present one.
RENAMED = {"objective.attention_context": "objective.attention_output"}

# A stream takes these from the section optimizer unless it gives its own.
STREAM_BATCHES = ("global_batch", "micro_batch")

# The sections of named entries.
GROUPS = ("streams", "stages")

# A stage takes the keys that it leaves out of these sections from the run's section of that name.
STAGE_SECTIONS = ("trainable", "data", "optimizer")


def load_config(path: str | None, overrides: list[str], has_files: bool = True) -> Config:
    """Read a YAML file, given by its path or as a recipe's name, and apply overrides.

    Overrides are words such as ``--section.key value`` and ``--section.key=value``. A key that
    holds a list takes several values. The value ``null`` removes a key of the file, so that its
    default holds again.

    Args:
        has_files: whether model, text and output directory must be named, as for a run.

    Raises:
        UserError: the file cannot be read, a key is unknown (the nearest known key is named), or a
            value has the wrong type or is out of range.
    """
    tree = in_present_spelling(parse_file(find_config(path)), _warn) if path is not None else {}
    _name_entries(tree)
    # The file is checked without the overrides, which may replace a recipe's shared value in the
    # last stream that uses it.
    _check_shared_values(tree, None)
    keys = []
    for key, values in _pairs(overrides):
        present = present_spelling(key)
        if present != key:
            _warn(key, present)
        _override(tree, present, values)
        _name_entries(tree)
        keys.append(present)
    for key in keys:
        _check_shared_values(tree, key)
    # A faulty key is named as it was written, and not under a stage that takes it.
    _build(Config, {key: value for key, value in tree.items() if key not in GROUPS}, "")
    _complete_stages(tree)
    _complete_streams(tree)
    config = _build(Config, tree, "")
    validate(config, has_files)
    return config


def recorded_config(tree: dict) -> Config:
    """Return the configuration that a run recorded, with defaults for settings newer than the run.

    Raises:
        UserError: a setting is unknown or has the wrong type.
    """
    tree = json.loads(json.dumps(in_present_spelling(tree)))
    _complete_stages(tree)
    _complete_streams(tree)
    return _build(Config, tree, "")


def _pairs(overrides: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the keys with the words that follow them."""
    position = 0
    while position < len(overrides):
        word = overrides[position]
        if not word.startswith("--"):
            raise UserError(f"expected --section.key value, got {shown(word)}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            position += 1
            if position == len(overrides):
                raise UserError(
                    f"--{key} needs a value: only --preflight, --version and --help take none"
                )
            value = overrides[position]
        position += 1
        values = [value]
        while not equals and _holds_list(key) and position < len(overrides):
            if overrides[position].startswith("--"):
                break
            values.append(overrides[position])
            position += 1
        yield key, values


def _override(tree: dict, key: str, texts: list[str]) -> None:
    """Set or, for the text ``null``, remove one key of the tree, in place.

    Args:
        texts: the value, or the items of a list.
    """
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"--{key}: '{section}' is a value, not a section")
    items = [text if _holds_text(key, text) else parse_value(text) for text in texts]
    value: Any = items if len(items) > 1 else items[0]
    if value is None:
        tree.pop(last, None)
    else:
        tree[last] = value


def _holds_text(key: str, text: str) -> bool:
    """Whether a key holds text, which is taken as typed: a path may look like a number or a date.

    The word null still removes a text that may be left out.
    """
    hint, optional = _hint_of(key)
    return hint is str and not (optional and text in ("null", "~", ""))


def _holds_list(key: str) -> bool:
    return typing.get_origin(_hint_of(key)[0]) is list


def _hint_of(key: str) -> tuple[Any, bool]:
    """Return the type of a dotted key (None if it does not exist), and whether it is optional."""
    hint: Any = Config
    for name in present_spelling(key).split("."):
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        else:
            hint = type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return without_none(hint)


def present_spelling(key: str) -> str:
    """Return the present spelling of a dotted key."""
    for old, new in RENAMED.items():
        if key == old or key.endswith(f".{old}"):
            return key.removesuffix(old) + new
    return key


def in_present_spelling(
    tree: dict, on_old: Callable[[str, str], None] = lambda old, new: None, prefix: str = ""
) -> dict:
    """Return a copy of a tree of settings in which every key has its present spelling.

    Args:
        on_old: called with the old and the present spelling of every dotted key that was renamed.
    """
    result = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            value = in_present_spelling(value, on_old, f"{prefix}{key}.")
        dotted = f"{prefix}{key}"
        present = present_spelling(dotted)
        if present != dotted:
            on_old(dotted, present)
            key = present.rpartition(".")[2]
        result[key] = value
    return result


def _warn(old: str, present: str) -> None:
    print(f"warning: {old} is now called {present}", file=sys.stderr, flush=True)


def _check_shared_values(tree: dict, override: str | None) -> None:
    """Refuse a shared value that every stream, or every stage, replaces by its own.

    Args:
        tree: the configuration so far.
        override: the one key to check; None checks every key of the tree.

    Raises:
        UserError: a key has no effect; the message names it.
    """
    for group in GROUPS:
        entries = tree.get(group)
        if not isinstance(entries, dict):
            continue
        entries = [entry for entry in entries.values() if isinstance(entry, dict)]
        for key, in_entry in _shared_keys(tree, group):
            if override in (None, key) and entries and all(_has(e, in_entry) for e in entries):
                raise UserError(
                    f"{key} is given, but every {group[:-1]} gives its own: set "
                    f"{group}.NAME.{'.'.join(in_entry)} instead"
                )


def _shared_keys(tree: dict, group: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the keys that streams or stages take from other sections, with their place in them."""
    if group == "stages":
        for section in STAGE_SECTIONS:
            for path in _leaves(tree.get(section)):
                yield ".".join((section, *path)), (section, *path)
        return
    for section, names in (("optimizer", STREAM_BATCHES), ("data", None)):
        values = tree.get(section)
        for name in values if isinstance(values, dict) else ():
            if names is None or name in names:
                yield f"{section}.{name}", (name,) if names else (section, name)


def _leaves(tree: Any) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            yield from ((str(key), *path) for path in _leaves(value))
        else:
            yield (str(key),)


def _has(tree: dict, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _name_entries(tree: dict) -> None:
    """Make the names of streams and stages text, as overrides spell them, in place.

    The parser has refused names that are the same as text, such as 1 and "1".
    """
    for group in GROUPS:
        entries = tree.get(group)
        if isinstance(entries, dict):
            tree[group] = {str(name): entry for name, entry in entries.items()}
            for entry in entries.values():
                if isinstance(entry, dict):
                    _name_entries(entry)  # a stage may have streams


def _complete_streams(tree: dict) -> None:
    """Give each stream the values that it takes from other sections, in place."""
    streams = tree.get("streams")
    if streams is None:
        tree.pop("streams", None)
    if not isinstance(streams, dict) or not streams:
        return
    if tree.get("objective"):
        raise UserError(
            "objective and streams are both given: give each stream its objective under "
            "streams.NAME.objective"
        )
    optimizer = tree.get("optimizer")
    optimizer = optimizer if isinstance(optimizer, dict) else {}
    batches = {key: optimizer[key] for key in STREAM_BATCHES if optimizer.get(key) is not None}
    shared = {
        "data": tree.get("data") or {},
        **batches,
        "objective": {"relations": dict.fromkeys(RELATIONS, 0.0)},
    }
    tree["streams"] = {
        name: _merged(shared, stream or {}) if isinstance(stream, dict | None) else stream
        for name, stream in streams.items()
    }


def _complete_stages(tree: dict) -> None:
    """Give each stage the values that it takes from other sections, in place."""
    stages = tree.get("stages")
    if stages is None:
        tree.pop("stages", None)
    if not isinstance(stages, dict) or not stages:
        return
    shared = {section: tree.get(section) or {} for section in STAGE_SECTIONS}
    complete = {}
    for name, stage in stages.items():
        if not isinstance(stage, dict | None):
            complete[name] = stage
            continue
        merged = _merged(shared, stage or {})
        if isinstance(merged.get("objective"), dict) and merged["objective"]:
            merged["objective"] = _merged(
                {"relations": dict.fromkeys(RELATIONS, 0.0)}, merged["objective"]
            )
        elif not merged.get("streams"):
            merged |= {key: tree[key] for key in ("objective", "streams") if tree.get(key)}
        _complete_streams(merged)
        complete[name] = merged
    tree["stages"] = complete


def _merged(base: dict, over: dict) -> dict:
    """Return ``over``, completed from ``base``; sections are merged key by key."""
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict | None):
            merged[key] = _merged(base[key], over[key] or {})
    return merged


def _build(cls: Any, tree: Any, prefix: str) -> Any:
    """Make a section from a tree of plain values."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"'{prefix.rstrip('.')}' is a section, got the value {shown(tree)}")
    hints = type_hints(cls)
    names = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in names:
            nearest = _nearest(str(key), set(names), prefix)
            raise UserError(
                f"unknown key '{prefix}{shown(key).strip(chr(39))}'; the nearest known one is "
                f"'{nearest}'"
            )
        if allowed_of(names[key]).tokens:
            value = _in_tokens(value)
        values[key] = _convert(hints[key], value, f"{prefix}{key}")
    return cls(**values)


def _in_tokens(value: Any) -> Any:
    """Return numbers of tokens for lengths such as ``4K``; other values as they are."""
    if isinstance(value, list):
        return [_in_tokens(item) for item in value]
    if isinstance(value, str) and value[-1:] in ("k", "K"):
        with contextlib.suppress(UserError):
            return parse_length(value, least=0)
    return value


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Return a value as the type of its field, or raise a ``UserError``."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")
    hint, optional = without_none(hint)
    if value is None and optional:
        return None
    origin = typing.get_origin(hint)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"'{key}' is a section of named entries, got the value {shown(value)}")
        entry_hint = typing.get_args(hint)[1]
        return {name: _convert(entry_hint, entry, f"{key}.{name}") for name, entry in value.items()}
    if origin is list:
        items = value if isinstance(value, list) else [value]
        (item_hint,) = typing.get_args(hint)
        return [_convert(item_hint, item, key) for item in items]
    if isinstance(value, bool) and {"yes", "no"} <= set(typing.get_args(hint)):
        return "yes" if value else "no"  # YAML 1.1 reads the words yes and no as booleans
    expected = str if origin is typing.Literal else hint
    if expected is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML 1.1 reads 2e-5 as text.
        try:
            return float(value)
        except ValueError:
            pass
        except OverflowError:
            raise UserError(f"{key} must be a finite number; got {shown(value)}") from None
    elif isinstance(value, expected) and (expected is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{key} must be of type {expected.__name__}, got {shown(value)}")


def _nearest(key: str, names: set[str], prefix: str) -> str:
    """Return the known key that ``key`` most likely stands for, in this section or in another."""
    everywhere = {path.rpartition(".")[2]: path for path in _paths(Config, "")}
    # Abbreviations that difflib would not find.
    everywhere |= {"lr": "optimizer.learning_rate", "batch_size": "optimizer.global_batch"}
    if key in everywhere:
        return everywhere[key]
    here = difflib.get_close_matches(key[:100], names, n=1)
    elsewhere = [] if here else difflib.get_close_matches(key[:100], everywhere, n=1)
    if elsewhere:
        return everywhere[elsewhere[0]]
    return prefix + (here or difflib.get_close_matches(key[:100], names, n=1, cutoff=0.0))[0]


def _paths(cls: Any, prefix: str) -> list[str]:
    paths = []
    for name, hint in type_hints(cls).items():
        paths += _paths(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else []
        paths.append(prefix + name)
    return paths
