"""The study from its corpus to its report, with a teacher of one layer and a few steps."""

from __future__ import annotations

import json
import multiprocessing
from functools import partial

import pytest
import torch

from megalard.checkpoint.open import open_model
from tests.command_line import one_error, tool
from tests.pictures import draw_nothing
from tests.ranks import SERVER
from tools.study import pool, pretraining, run
from tools.study.description import Run
from tools.study.folder import Study
from tools.study.lengths import TASKS
from tools.study.results import read_results
from tools.study.run import execute

restoration = tool("study.restoration")
# So much smaller that four steps remain, of which the first is where methods are compared.
SHRINK = 61
OPTIONS = ("--device", "cpu", "--shrink", SHRINK, "--methods", "linearard", "--ropes", "linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    """A study's folder with a corpus and a pre-trained teacher."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "corpus").symlink_to(corpus, target_is_directory=True)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    # With the usual 0.02 the scores of so small a model are zero, whatever its RoPE.
    small |= {"initializer_range": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        patch.setattr(pretraining, "TEACHER", pretraining.TEACHER | small)
        assert restoration("pretrain", folder, "--shrink", 3000, "--device", "cpu") == 0
    return folder


def test_the_teacher_is_trained_by_megalard_and_kept_in_bf16(folder):
    teacher = open_model(folder / "teacher")
    assert teacher.window == 512 and teacher.tokenizer.vocab_size == 600
    name = "model.layers.0.self_attn.q_proj.weight"
    assert str(teacher.weights.dtype(name)) == "torch.bfloat16"
    start, trained = (open_model(folder / d).weights.read(name) for d in ("start", "teacher"))
    assert not start.equal(trained.float())
    steps = (folder / "pretraining" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(steps[-1])["step"] == 2


@pytest.fixture(scope="module")
def finished(folder):
    """The same folder after all stages, with the text that they printed on the way."""
    assert restoration("search", folder, *OPTIONS) == 0
    assert restoration("final", folder, "--seeds", 1, *OPTIONS) == 0
    assert restoration("timing", folder, *OPTIONS) == 0
    return folder


def test_every_stage_appends_its_results(finished):
    results = read_results(finished)
    kinds = [result["kind"] for result in results]
    assert kinds == ["search"] * 4 + ["baseline"] * 2 + ["final", "timing"]
    searches, (teacher, scaled), (final, timing) = results[:4], results[4:6], results[6:]
    assert len({result["rate"] for result in searches}) == 4
    assert all(list(result["validation"]) == ["python"] for result in searches)
    assert teacher["compared"]["domains"]["python"]["512"]["kl"] == pytest.approx(0, abs=1e-6)
    assert scaled["compared"]["domains"]["prose"]["512"]["kl"] > 0
    assert [point["tokens"] for point in final["curve"]] == [4096, 2 * 4096, 4 * 4096]
    assert set(final["compared"]["tasks"]) == set(TASKS)
    assert set(final["compared"]["domains"]) == {"python", "prose"}
    assert final["loss"] > 0 and final["peak_memory"] > 0 and final["tokens_per_step"] == 4096
    assert timing["seconds_per_step"] > 0 and timing["curve"] == []


def test_a_run_that_has_a_result_is_not_repeated(finished, capsys):
    lines = (finished / "results.jsonl").read_text()
    assert restoration("final", finished, "--seeds", 1, *OPTIONS) == 0
    assert (finished / "results.jsonl").read_text() == lines


def test_the_report_can_be_made(finished, tmp_path, capsys):
    assert restoration("report", finished, "--output", tmp_path / "report") == 0
    assert "LinearARD (published)" in capsys.readouterr().out
    assert (tmp_path / "report" / "restoration-passkey.png").stat().st_size > 1000


def test_a_run_that_fails_does_not_end_the_others(folder, tmp_path, monkeypatch, capsys):
    def fail_once(study, run):
        if run.rate == 1e-3:
            raise RuntimeError("out of luck")
        return {"key": run.key, "kind": "search"}

    monkeypatch.setattr(run, "execute", fail_once)
    other = tmp_path / "study"
    other.mkdir()
    for name in ("corpus", "teacher"):
        (other / name).symlink_to(folder / name, target_is_directory=True)
    assert restoration("search", other, *OPTIONS) == 1
    captured = capsys.readouterr()
    assert "1 of 4 runs failed" in one_error(captured.err)
    assert "out of luck" in captured.out
    assert len(read_results(other)) == 3


def test_no_run_is_started_after_the_time_limit(folder, tmp_path):
    other = tmp_path / "study"
    other.mkdir()
    for name in ("corpus", "teacher"):
        (other / name).symlink_to(folder / name, target_is_directory=True)
    assert restoration("search", other, "--seconds", 0, *OPTIONS) == 0
    assert read_results(other) == []


def test_runs_are_ordered_by_seed_and_length():
    runs = [Run("final", m, "linear", 0.1, s) for s in (2, 1) for m in ("logits", "cpt", "ours")]
    order = [(r.seed, r.method) for r in sorted(runs, key=lambda run: run.order)]
    assert order[:2] == [(1, "cpt"), (1, "logits")] and order[3] == (2, "cpt")


def test_two_workers_give_the_results_of_one(finished, tmp_path, monkeypatch):
    """In processes of their own, on a search of two of the rates."""
    if not torch.cuda.is_available():  # CUDA has not been tried in forked workers.
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: SERVER)
    runs = [Run("search", "linearard", "linear", rate) for rate in (3e-4, 1e-3)]
    other = tmp_path / "study"
    other.mkdir()
    for name in ("corpus", "teacher"):
        (other / name).symlink_to(finished / name, target_is_directory=True)
    opened = partial(Study, other, "python", "cpu", SHRINK)
    pool.run_all("search", runs, other, opened, execute, workers=2, seconds=1e9)
    ours = {result["key"]: result["validation"] for result in read_results(other)}
    theirs = {result["key"]: result for result in read_results(finished)}
    assert len(ours) == 2
    for key, validation in ours.items():
        for length, measurement in validation["python"].items():
            expected = theirs[key]["validation"]["python"][length]
            assert measurement["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_timed_run_does_without_a_teacher_that_it_does_not_need(folder, monkeypatch):
    teachers = {}

    def note(study, run, models, training, tokens_per_step):
        teachers[run.method] = training.teacher
        return {}

    monkeypatch.setattr(run, "_train", note)
    study = Study(folder, "python", "cpu", SHRINK)
    for method in ("cpt", "linearard"):
        execute(study, Run("timing", method, "linear", 1e-3))
    assert teachers["cpt"] is None and teachers["linearard"] is not None


@pytest.mark.parametrize(
    ("stage", "options", "sentence"),
    [
        ("pretrain", (), "has no mixed/train: make it with python -m tools.study.corpus"),
        ("search", (), "has no teacher: run the command pretrain first"),
        ("final", (), "no learning rate of linearard was tried: run the command search with it"),
    ],
)
def test_a_stage_that_comes_too_early_is_refused(stage, options, sentence, tmp_path, capsys):
    assert restoration(stage, tmp_path, *options) == 1
    assert sentence in one_error(capsys.readouterr().err)


def test_text_that_is_not_there_is_refused(folder, capsys):
    assert restoration("search", folder, "--domain", "poetry", *OPTIONS) == 1
    assert "has no text of --domain poetry" in one_error(capsys.readouterr().err)
