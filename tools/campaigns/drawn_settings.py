"""Draw whole configurations: trees of plausible settings with streams and stages, written as YAML.

Most values are right, so that what depends on several settings is reached. Some are odd, and the
text has the features of YAML that people use and those that attackers use: anchors, merge keys,
flow style, comments, documents, tags and repeated keys.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import typing
from typing import Any

import yaml

from megalard.config.fields import without_none
from megalard.config.schema import Config, StageConfig, StreamConfig

NAMES = ("a", "long", "short-to-long", "main", "1", "a.b", "null", "é", "..", "a/b", "x" * 80, "-")
_ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e300, float("inf")),
    *(float("nan"), "", " ", "4K", "1M", "x", "../x", "a\nb", "\x1b[31m", "é", "x" * 5000),
    *([], [0], [1, 1], ["q"], [None], {}, {"a": 1}, [[1]], {"q": {"q": 1}}, {1: 2}, "2020-01-01"),
)
_SIZES = (1, 2, 3, 4, 8, 16, 64, 96, 1024, 4096, 32768, 10**6)


def draw_tree(rng: random.Random) -> dict:
    """Return a configuration as a tree, of which parts may be odd."""
    tree = _section(rng, Config, rng.choice([0.01, 0.03, 0.1, 0.3]))
    for group, kind in (("streams", StreamConfig), ("stages", StageConfig)):
        tree.pop(group, None)
        if rng.random() < 0.35:
            names = rng.sample(NAMES[:4] if rng.random() < 0.7 else NAMES, rng.choice([1, 2, 3]))
            tree[group] = {name: _section(rng, kind, rng.choice([0.03, 0.2])) for name in names}
            tree.pop("objective" if group == "streams" and rng.random() < 0.8 else "", None)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        holder, key = rng.choice(list(_places(tree)) or [(tree, "run")])
        holder[key] = copy.deepcopy(rng.choice(_ODD))
    return tree


def _section(rng: random.Random, cls: Any, share: float) -> dict:
    """Return some of the settings of a section, with values of their types."""
    hints, tree = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        hint, _ = without_none(hints[field.name])
        if dataclasses.is_dataclass(hint):
            inner = _section(rng, hint, share)
            if inner:
                tree[field.name] = inner
        elif typing.get_origin(hint) is not dict and rng.random() < share:
            tree[field.name] = _value(rng, hint)
    return tree


def _value(rng: random.Random, hint: Any) -> Any:
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        items = [_value(rng, item) for _ in range(rng.choice([0, 1, 2, 2, 3, 3]))]
        return items if rng.random() < 0.2 else list(dict.fromkeys(items))
    if typing.get_origin(hint) is typing.Literal:
        return rng.choice(typing.get_args(hint))
    if hint is bool:
        return rng.random() < 0.5
    if hint is int:
        return rng.choice(_SIZES)
    if hint is float:
        return rng.choice([0.0, 1e-5, 0.1, 0.5, 0.9, 1.0, 2.0, 8.0])
    return rng.choice(["text.txt", "text", "tokens", "a/b", "x"])


def _places(tree: dict):
    for key, value in tree.items():
        yield tree, key
        if isinstance(value, dict):
            yield from _places(value)


def write_yaml(rng: random.Random, tree: dict) -> str:
    """Return a tree as YAML, in one of several styles and with one of several additions."""
    flow = rng.choice([None, None, True, False])
    text = yaml.safe_dump(tree, default_flow_style=flow, sort_keys=False, allow_unicode=True)
    choice = rng.random()
    if choice < 0.75:
        return text
    return rng.choice(_ADDITIONS)(rng, text, tree)


def _shared(rng: random.Random, text: str, tree: dict) -> str:
    """Give the streams or stages one text that they share, as people do."""
    group = rng.choice(["streams", "stages"])
    rest = {key: value for key, value in tree.items() if key != group}
    data = tree.get("data") if isinstance(tree.get("data"), dict) else {"context_length": 64}
    lines = [yaml.safe_dump(rest), f"{group}:", f"  a: &a {{data: {yaml.safe_dump(data)[:-1]!r}}}"]
    if rng.random() < 0.7:
        inner = yaml.safe_dump(data, default_flow_style=True).strip()
        lines[-1] = f"  a: &a {{data: &d {inner}}}"
    lines.append(rng.choice(["  b: *a", "  b: {<<: *a, weight: 2}", "  b: {data: *d}", "  <<: *a"]))
    return "\n".join(lines) + "\n"


def _repeated(rng: random.Random, text: str, tree: dict) -> str:
    lines = text.splitlines()
    return "\n".join([*lines, *rng.sample(lines, min(2, len(lines)))]) + "\n"


def _indented(rng: random.Random, text: str, tree: dict) -> str:
    lines = text.splitlines()
    for number in rng.sample(range(len(lines)), min(2, len(lines))):
        lines[number] = (
            rng.choice([" ", "  ", "\t", "- ", "# ", "? ", "! ", "| ", "> "]) + lines[number]
        )
    return "\n".join(lines) + "\n"


def _document(rng: random.Random, text: str, tree: dict) -> str:
    return rng.choice(
        ["---\n{}", "{}---\n{}", "%YAML 1.2\n---\n{}", "\ufeff{}", "{}...\n"]
    ).replace("{}", text)


def _tagged(rng: random.Random, text: str, tree: dict) -> str:
    tag = rng.choice(["!!str", "!!int", "!!float", "!!map", "!!seq", "!x", "!!set", "!!omap", "&z"])
    return text.replace(": ", f": {tag} ", rng.choice([1, 3, -1]))


def _cut(rng: random.Random, text: str, tree: dict) -> str:
    return text[: rng.randrange(len(text) + 1)]


_ADDITIONS = (_shared, _shared, _repeated, _indented, _document, _tagged, _cut)
