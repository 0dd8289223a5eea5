"""Which changes there are: cosmic-ray's operators, and two of ours, on every place of a file.

The operators of cosmic-ray change what is computed. Wiring has none there, so that two are added:
an argument that is not handed over, and a statement that is left out. Types, docstrings and the
kernels for GPUs are left alone.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

from megalard.errors import UserError

DROP_KEYWORD, DROP_STATEMENT = "keyword argument left out", "statement left out"

Span = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        path: the file, from the root of the checkout.
        operator: the name of an operator.
        occurrence: which of the places of the file where the operator applies.
        place: line and column, counted from 1 and from 0.
    """

    path: str
    operator: str
    occurrence: int
    place: tuple[int, int]

    @property
    def key(self) -> str:
        """What names the mutant in a file of results."""
        return f"{self.path}:{self.operator}:{self.occurrence}"

    @property
    def kind(self) -> str:
        """The operator without what it puts in place: one of several that apply to a place."""
        return self.operator.rpartition("/")[2].split("_")[0]


def sample(root: Path, files: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Draw mutants: places with the same probability, and one of the changes of each.

    A change that is no Python is left out.

    Raises:
        UserError: there is no place.
    """
    by_place: dict[tuple, list[Mutant]] = {}
    for file in files:
        for mutant in all_mutants(file, (root / file).read_text(encoding="utf-8")):
            by_place.setdefault((file, mutant.place, mutant.kind), []).append(mutant)
    if not by_place:
        raise UserError("there is nothing to mutate: choose another revision for --changed")
    rng = random.Random(seed)
    places = sorted(by_place)
    rng.shuffle(places)
    drawn = (rng.choice(by_place[place]) for place in places)
    return list(islice((m for m in drawn if _is_python(root, m)), count))


def _is_python(root: Path, mutant: Mutant) -> bool:
    try:
        ast.parse(mutated(mutant, (root / mutant.path).read_text(encoding="utf-8")))
    except SyntaxError:
        return False
    return True


def all_mutants(path: str, source: str) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    syntax, operators = _cosmic_ray()
    ignored = without_effect(source)

    def is_ignored(span: Span) -> bool:
        return any(a <= span[0] and span[1] <= b for a, b in ignored)

    nodes = list(syntax.ast_nodes(syntax.get_ast(source)))
    for name, operator in operators.items():
        spans = (span for node in nodes for span in operator.mutation_positions(node))
        for occurrence, span in enumerate(spans):
            if not is_ignored(span):
                yield Mutant(path, name, occurrence, span[0])
    for name, find in ((DROP_KEYWORD, _keywords), (DROP_STATEMENT, _statements)):
        for occurrence, span in enumerate(find(source)):
            if not is_ignored(span):
                yield Mutant(path, name, occurrence, span[0])


def mutated(mutant: Mutant, source: str) -> str:
    """Return the source with the change."""
    if mutant.operator == DROP_KEYWORD:
        return _replaced(source, list(_keywords(source))[mutant.occurrence], "")
    if mutant.operator == DROP_STATEMENT:
        return _replaced(source, list(_statements(source))[mutant.occurrence], "pass")
    from cosmic_ray.mutating import mutate_code

    return mutate_code(source, _cosmic_ray()[1][mutant.operator], mutant.occurrence)


def _cosmic_ray():
    """Return cosmic-ray's module for syntax trees, and its operators without arguments by name."""
    try:
        import cosmic_ray.ast as syntax
        from cosmic_ray import plugins
    except ImportError:
        raise UserError(
            "cosmic-ray is not installed: python -m pip install -e '.[mutation]'"
        ) from None
    classes = {name: plugins.get_operator(name) for name in plugins.operator_names()}
    return syntax, {name: kind() for name, kind in classes.items() if not kind.arguments()}


def _keywords(source: str) -> Iterator[Span]:
    """Yield the keyword arguments of calls, each with the comma after it; columns in bytes."""
    lines = source.encode().splitlines()
    for node in ast.walk(ast.parse(source)):
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            if keyword.arg is not None:
                start, (line, column) = _span(keyword)
                yield start, (line, column + lines[line - 1][column:].startswith(b","))


def _statements(source: str) -> Iterator[Span]:
    """Yield the calls, assignments in place and raised errors that are statements."""
    for node in ast.walk(ast.parse(source)):
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if is_call or isinstance(node, (ast.AugAssign, ast.Raise)):
            yield _span(node)


def _span(node: ast.AST) -> Span:
    place = cast(ast.expr, node)
    end = (place.end_lineno or 0, place.end_col_offset or 0)
    return (place.lineno, place.col_offset), end


def _replaced(source: str, span: Span, text: str) -> str:
    lines = source.encode().splitlines(keepends=True)
    (first, start), (last, end) = span
    middle = lines[first - 1][:start] + text.encode() + lines[last - 1][end:]
    return b"".join([*lines[: first - 1], middle, *lines[last:]]).decode()


def without_effect(source: str) -> list[Span]:
    """Return the places of what computes nothing.

    These are type annotations, docstrings, and whether a dataclass may be changed.
    """
    spans = []
    for node in ast.walk(ast.parse(source)):
        nodes = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and node.body:
            first = node.body[0]
            is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            nodes += [first] if is_text else []
        if isinstance(node, ast.ClassDef):
            nodes += [d for d in node.decorator_list if "dataclass" in ast.unparse(d)]
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            nodes.append(node)
        spans += [_span(place) for place in nodes if place is not None]
    return spans
