"""Mutants: which places are changed, and that a change is one change."""

from __future__ import annotations

import ast
import difflib

import pytest

from tools.mutation import places
from tools.mutation.places import DROP_KEYWORD, DROP_STATEMENT, Mutant, mutated

SOURCE = '''"""A file, 1 + 1."""

from __future__ import annotations


def f(x: int | None, é: float = 2) -> dict[str, int]:
    """Return a sum."""
    total = g(x, scale=3, shift=é)
    total += 1
    print(total, end="", flush=True)
    if total < 0:
        raise ValueError(total)
    return dict(a=total)
'''


def lines_changed(after: str) -> list[str]:
    lines = difflib.ndiff(SOURCE.splitlines(), after.splitlines())
    return [line[2:].strip() for line in lines if line.startswith("+ ")]


@pytest.mark.parametrize(
    ("occurrence", "line"),
    [
        (0, "total = g(x,  shift=é)"),
        (1, "total = g(x, scale=3, )"),
        (2, "print(total,  flush=True)"),
        (3, 'print(total, end="", )'),
        (4, "return dict()"),
    ],
)
def test_one_keyword_argument_is_left_out(occurrence, line):
    after = {
        tuple(lines_changed(mutated(Mutant("f.py", DROP_KEYWORD, n, (1, 0)), SOURCE)))
        for n in range(5)
    }
    assert (line,) in after
    ast.parse(mutated(Mutant("f.py", DROP_KEYWORD, occurrence, (1, 0)), SOURCE))


def test_one_statement_is_left_out():
    afters = [mutated(Mutant("f.py", DROP_STATEMENT, n, (1, 0)), SOURCE) for n in range(3)]
    assert all(lines_changed(after) == ["pass"] for after in afters)
    lost = {"".join(set(SOURCE.splitlines()) - set(after.splitlines())).strip() for after in afters}
    assert lost == {
        "total += 1",
        'print(total, end="", flush=True)',
        "raise ValueError(total)",
    }


def test_types_and_docstrings_are_left_alone():
    source = SOURCE + "@dataclass(frozen=True)\nclass Point:\n    x: int = 0\n"
    ignored = places.without_effect(source)
    lines = source.splitlines()
    texts = {lines[a - 1].encode()[start:end].decode() for (a, start), (_, end) in ignored}
    assert texts == {
        '"""A file, 1 + 1."""',
        "int | None",
        "float",
        "dataclass(frozen=True)",
        "int",
        "dict[str, int]",
        '"""Return a sum."""',
    }


def test_cosmic_ray_s_operators_are_used(tmp_path):
    pytest.importorskip("cosmic_ray", reason="needs the extra mutation")
    (tmp_path / "f.py").write_text(SOURCE)
    drawn = places.sample(tmp_path, ["f.py"], 1000, seed=0)
    kinds = {mutant.kind for mutant in drawn}
    assert {"NumberReplacer", "ReplaceComparisonOperator", DROP_KEYWORD, DROP_STATEMENT} <= kinds
    assert places.sample(tmp_path, ["f.py"], 5, seed=0) == drawn[:5]
    for mutant in drawn:
        assert mutated(mutant, SOURCE) != SOURCE and mutant.place[0] > 6
