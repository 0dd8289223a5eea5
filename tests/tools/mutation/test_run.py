"""Mutants are tried on a copy, with the tests of their file first."""

from __future__ import annotations

import argparse
import json
import sys

import pytest

from megalard.errors import UserError
from tests.command_line import user_error
from tools.mutation import run
from tools.mutation.places import DROP_STATEMENT, Mutant

PYTEST = run.Pytest(sys.executable, 60)


@pytest.mark.parametrize(
    ("path", "first", "second"),
    [
        ("megalard/model/rope.py", "tests/model/test_rope.py", "tests/model"),
        ("megalard/cli.py", "tests/test_cli.py", None),
        ("megalard/model/ops.py", "tests/model", None),
        (
            "megalard/checkpoint/sharded/manifest.py",
            "tests/checkpoint/sharded/test_manifest.py",
            "tests/checkpoint/sharded",
        ),
        ("kernels/relation_kl/mask.py", "tests/kernels/test_mask.py", "tests/kernels"),
    ],
)
def test_the_tests_of_a_file_are_those_of_its_mirror(path, first, second):
    groups = run.tests_of(path)
    assert groups[0] == [first] and groups[-1] == ["tests/settings", "tests/parity/test_parity.py"]
    assert groups[1:-1] == ([] if second is None else [[second]])
    assert all((run.ROOT / name).exists() for group in groups for name in group)


def test_the_package_is_mutated_without_the_kernels_for_gpus():
    files = run.package_files()
    assert "megalard/model/rope.py" in files and "kernels/relation_kl/mask.py" in files
    assert not any("hopper" in file or "triton" in file or "tests" in file for file in files)
    assert "git diff" in user_error(run.package_files, "no-such-revision")


@pytest.fixture
def copy(tmp_path):
    """A checkout of one function and its test."""
    folder = tmp_path / "copy"
    (folder / "tests").mkdir(parents=True)
    (folder / "code.py").write_text("def f(x):\n    x += 1\n    x *= 1\n    return x\n")
    test = "from code_under_test import f\n\n\ndef test_f():\n    assert f(1) == 2, 'a - b'\n"
    (folder / "tests" / "test_code.py").write_text(test)
    (folder / "code_under_test.py").write_text((folder / "code.py").read_text())
    return folder


def test_a_mutant_is_caught_or_survives_and_is_taken_back(copy, monkeypatch):
    monkeypatch.setattr(run, "tests_of", lambda path: [["tests/test_code.py"]])
    before = (copy / "code_under_test.py").read_text()
    mutants = [Mutant("code_under_test.py", DROP_STATEMENT, n, (2, 4)) for n in range(2)]
    results = [run.try_mutant(mutant, copy, PYTEST) for mutant in mutants]
    assert results[0]["caught_by"] == "tests/test_code.py::test_f" and not results[1]["caught_by"]
    assert "-    x *= 1" in results[1]["diff"] and "+    pass" in results[1]["diff"]
    assert (copy / "code_under_test.py").read_text() == before


def test_a_test_that_fails_without_a_change_catches_nothing(copy, monkeypatch):
    monkeypatch.setattr(run, "tests_of", lambda path: [["tests/test_code.py"]])
    (copy / "tests" / "test_code.py").write_text("def test_f():\n    assert False\n")
    mutant = Mutant("code_under_test.py", DROP_STATEMENT, 0, (2, 4))
    sentence = user_error(run.try_mutant, mutant, copy, PYTEST)
    assert "tests/test_code.py::test_f fails without any change" in sentence
    without = run.Pytest(sys.executable, 60, ["tests/test_code.py::test_f"])
    assert run.try_mutant(mutant, copy, without)["caught_by"] == ""


def test_the_name_of_a_test_may_have_spaces():
    printed = "..F\nFAILED tests/test_a.py::test_f[with two-words] - assert 1 - 2\n1 failed\n"
    assert run._FAILED.findall(printed) == ["tests/test_a.py::test_f[with two-words]"]
    assert run._FAILED.findall("ERROR tests/test_a.py\n") == ["tests/test_a.py"]


def test_a_mutant_that_takes_too_long_is_caught(copy, monkeypatch):
    monkeypatch.setattr(run, "tests_of", lambda path: [["tests/test_code.py"]])
    sleeping = "import time\n\n\ndef test_f():\n    time.sleep(99)\n"
    (copy / "tests" / "test_code.py").write_text(sleeping)
    mutant = Mutant("code_under_test.py", DROP_STATEMENT, 0, (2, 4))
    assert run.try_mutant(mutant, copy, run.Pytest(sys.executable, 3))["caught_by"] == "time (3 s)"


@pytest.fixture
def options(tmp_path, monkeypatch):
    """The options of a run that copies nothing."""
    monkeypatch.setattr(run, "copy_checkout", lambda target: target)
    monkeypatch.setattr(run.signal, "signal", lambda *arguments: None)
    return argparse.Namespace(
        changed=None,
        count=2,
        seed=0,
        output=tmp_path / "x.jsonl",
        python="python",
        limit_s=1.0,
        jobs=1,
        deselect=[],
    )


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_are_kept_and_survivors_give_status_1(jobs, options, monkeypatch, capsys):
    options.jobs = jobs
    mutants = [Mutant("megalard/cli.py", DROP_STATEMENT, n, (n, 0)) for n in range(2)]
    tried = []

    def answer(mutant, *rest):
        tried.append(mutant)
        caught = "tests/test_cli.py" if mutant.occurrence else ""
        return {"key": mutant.key, "caught_by": caught, "diff": f"diff {mutant.occurrence}\n"}

    monkeypatch.setattr(run, "sample", lambda *arguments: mutants)
    monkeypatch.setattr(run, "try_mutant", answer)
    assert run.run(options) == run.run(options) == 1
    assert sorted(tried, key=lambda mutant: mutant.occurrence) == mutants
    assert len(options.output.read_text().splitlines()) == 2
    printed = capsys.readouterr().out
    assert "diff 0\n1 of 2 mutants survived" in printed and "diff 1" not in printed
    lines = options.output.read_text().splitlines()
    caught = [json.loads(line)["caught_by"] for line in lines]
    assert sorted(caught) == ["", "tests/test_cli.py"]


def test_the_others_are_tried_when_a_mutant_has_no_result(options, monkeypatch, capsys):
    mutants = [Mutant("megalard/cli.py", DROP_STATEMENT, n, (n, 0)) for n in range(2)]

    def answer(mutant, *rest):
        if mutant.occurrence == 0:
            raise UserError("tests/test_a.py::test_f fails without any change")
        return {"key": mutant.key, "caught_by": "tests/test_cli.py", "diff": ""}

    monkeypatch.setattr(run, "sample", lambda *arguments: mutants)
    monkeypatch.setattr(run, "try_mutant", answer)
    sentence = user_error(run.run, options)
    assert sentence.startswith("1 mutants have no result") and "test_f fails" in sentence
    assert "0 of 1 mutants survived" in capsys.readouterr().out
    assert list(run.read_results(options.output)) == [mutants[1].key]
