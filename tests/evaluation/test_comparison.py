"""Comparisons: lengths, names of models, and files that appear completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalard.checkpoint.open import open_model
from megalard.evaluation import comparison
from megalard.evaluation.comparison import (
    Request,
    choose_lengths,
    compare_models,
    short_names,
)
from megalard.parallel.mesh import build_mesh
from tests.command_line import user_error
from tests.jobs import make_job


def test_given_lengths_are_sorted_and_must_be_divided_by_the_cp_ranks():
    assert choose_lengths(["4K", "16", "16"], [], 1) == [16, 4096]
    assert "length 100 in --lengths or --task-lengths is not a multiple of 8" in user_error(
        choose_lengths, ["100"], [], 4
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job, whose model has a window of 64 tokens."""
    return make_job(tmp_path_factory.mktemp("comparison"))


def test_default_lengths_go_from_the_smallest_window_to_the_largest(job):
    class Longer:
        window = 250

    model = open_model(job / "model")
    assert choose_lengths(None, [model], 1) == [16, 32, 64]
    assert choose_lengths(None, [model, Longer], 1) == [16, 32, 64, 128, 250]
    # What the cp ranks do not divide is rounded down.
    assert choose_lengths(None, [model, Longer], 4) == [16, 32, 64, 128, 248]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/runs/a/student"], ["student"]),
        (["/runs/a/student", "/runs/b/student"], ["a/student", "b/student"]),
        (["/x/model", "/y/other"], ["model", "other"]),
        (["/m", "/m"], ["//m (1)", "//m (2)"]),
    ],
)
def test_models_have_the_shortest_names_that_differ(paths, names):
    assert short_names([Path(path) for path in paths]) == names


def request(job, output, **changes) -> Request:
    """Return a quick request."""
    settings = {
        "models": [job / "model"],
        "output": output,
        "text": [str(job / "heldout.txt")],
        "text_key": "text",
        "max_tokens": 128,
        "lengths": ["32"],
        "teacher": None,
        "tasks": [],
        "task_lengths": None,
        "depths": [0.5],
        "samples": 1,
        "filler": "sentences",
        "seed": 0,
        "bos": "auto",
        "eos": "auto",
        "tokenizer": None,
        "base": None,
        "dtype": "float32",
    }
    return Request(**settings | changes)


def test_a_report_that_cannot_be_written_leaves_nothing(job, tmp_path, monkeypatch):
    def fail(path, *arguments):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comparison, "write_json", fail)
    sentence = user_error(compare_models, request(job, tmp_path / "a"), build_mesh("cpu", 1))
    assert sentence == f"cannot write {tmp_path / 'a.json'}: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_not_replaced(job, tmp_path, monkeypatch):
    write = comparison.write_json

    def slowly(path, *arguments):
        (tmp_path / "a.json").write_text("precious")
        write(path, *arguments)

    monkeypatch.setattr(comparison, "write_json", slowly)
    sentence = user_error(compare_models, request(job, tmp_path / "a"), build_mesh("cpu", 1))
    assert sentence == f"cannot write {tmp_path / 'a.json'}: File exists"
    assert (tmp_path / "a.json").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    job, tmp_path, monkeypatch
):
    monkeypatch.setattr(comparison, "run_suite", None)
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "a"
    sentence = user_error(compare_models, request(job, output), build_mesh("cpu", 1))
    assert sentence == f"cannot write to {tmp_path / 'file'}: File exists"
