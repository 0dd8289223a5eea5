"""YAML with limits: plain values only, each key once, and no file that expands without bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megalard.errors import UserError, reason_of
from megalard.files.reading import read_text

_FILE_BYTES = 2**20
# Nodes of one file after its aliases are expanded, and how deep they may be nested.
_NODES, _DEPTH = 20_000, 32
_DIGITS = 100  # of one whole number

_PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "merge")


class _PlainLoader(yaml.SafeLoader):
    """A loader of plain values that refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key that is not a word {key.start_mark}")
            if key.value in keys and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"{key.value!r} is given twice {node.start_mark}".strip())
            keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _DIGITS:
            raise yaml.YAMLError(f"a whole number has more than {_DIGITS} digits")
        return super().construct_yaml_int(node)


# Dates and binary data have no place in a configuration; as text they are checked like other text.
_PlainLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in _PLAIN_TAGS]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _PLAIN_TAGS
} | {"tag:yaml.org,2002:int": _PlainLoader.construct_yaml_int}


def parse_file(path: str) -> dict:
    """Read a YAML file whose content is a mapping.

    Raises:
        UserError: the file cannot be read, is not valid YAML, is too large, or holds something
            else.
    """
    try:
        tree = _parse(read_text(Path(path), _FILE_BYTES, "config file"))
    except _ERRORS as error:
        reason = reason_of(error)
        raise UserError(f"{path} is not valid YAML: {reason}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections such as 'model:' and 'data:'")
    return tree


def parse_value(text: str) -> Any:
    """Return the value of an override; text that is not valid YAML is returned as it is."""
    try:
        return _parse(text)
    except _ERRORS:
        return text


# PyYAML raises its own errors and those of int(), of float() and of too deep recursion.
_ERRORS = (yaml.YAMLError, ValueError, KeyError, IndexError, TypeError, RecursionError)


def _parse(text: str) -> Any:
    if len(text) > _FILE_BYTES:
        raise yaml.YAMLError(f"it has more than {_FILE_BYTES} characters")
    _check_depth(text)
    loader = _PlainLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check_size(root)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    """Refuse text that is nested too deep, before anything that recurses reads it."""
    depth = 0
    for event in yaml.parse(text, Loader=_PlainLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEPTH:
            raise yaml.YAMLError(f"it is nested more than {_DEPTH} deep")


def _check_size(root: yaml.Node) -> None:
    """Refuse a document that is nested too deep or too large, counting what its aliases repeat."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > _DEPTH:  # an alias may hold the node that it is in
            raise yaml.YAMLError(f"it is nested more than {_DEPTH} deep")
        if id(node) not in sizes:
            children: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                children = [child for pair in node.value for child in pair]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in children)
        if sizes[id(node)] > _NODES:
            raise yaml.YAMLError(f"it has more than {_NODES} values")
        return sizes[id(node)]

    size(root, 0)
