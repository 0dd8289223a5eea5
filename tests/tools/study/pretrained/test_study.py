"""The study of a pre-trained model from its search to its report, on a random model."""

from __future__ import annotations

import shutil

import pytest

from tests.command_line import one_error, tool
from tests.models import make_model
from tests.processes import CHECKOUT
from tools.study.pretrained import folder as study_folder
from tools.study.pretrained.folder import Sizes
from tools.study.pretrained.methods import STAGES, Stage
from tools.study.pretrained.questions import Question, write_questions
from tools.study.results import read_results

study = tool("study.pretrained.study")
WINDOW, FACTOR = 256, 2
OPTIONS = ("--device", "cpu", "--ropes", "linear", "--factors", FACTOR, "--methods", "logits+cpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study with a random teacher, two domains of text and two tasks, before any run."""
    folder = tmp_path_factory.mktemp("study")
    shape = {"vocab_size": 512, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 0}
    make_model("llama", folder / "teacher", max_position_embeddings=WINDOW, **shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKOUT / "launch" / "quickstart_teacher" / name, folder / "teacher")
    domains = []
    for number, name in enumerate(("manuals", "news")):
        for part in range(30):
            path = folder / "text" / name / str(part) / "page.txt"
            path.parent.mkdir(parents=True)
            path.write_text(f"{name} {part}: the value of x is {part * number}.\n" * 120)
        domains += ["--domain", f"{name}={folder / 'text' / name}"]
    paths = ("--model", folder / "teacher", "--output", folder / "corpus")
    assert tool("study.pretrained.corpus")(*paths, *domains) == 0
    for task in ("blimp", "piqa"):
        questions = [Question(["", ""], [f"The {n}.", f"{n} the."], 0, False) for n in range(4)]
        write_questions(folder / "choices" / f"{task}.jsonl.gz", questions)
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """The same folder after all steps, with two rates per stage and little text."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("logits", "cpt"):
            patch.setitem(STAGES, stage, Stage(STAGES[stage].label, (1e-3, 3e-3)))
        small = Sizes(validation=1024, short=1024, long=1024, samples=1)
        patch.setattr(study_folder, "Sizes", lambda: small)
        tokens = ("--tokens", 2048)
        assert study("search", folder, *OPTIONS, *tokens) == 0
        assert study("final", folder, *OPTIONS, *tokens, "--questions", 3) == 0
        # What has a result is not repeated.
        before = (folder / "results.jsonl").read_text()
        assert study("final", folder, *OPTIONS, *tokens, "--questions", 3) == 0
        assert (folder / "results.jsonl").read_text() == before
        assert study("report", folder, "--output", folder / "report") == 0
    return folder


def test_every_step_appends_its_results(finished):
    results = read_results(finished)
    searches = {(r["method"], *r["rates"]) for r in results if r["kind"] == "search"}
    assert searches == {(p, rate) for p in ("logits", "cpt") for rate in (1e-3, 3e-3)}
    teacher, scaled, final = (
        next(r for r in results[4:] if r["method"] == name)
        for name in ("teacher", "scaled", "logits+cpt")
    )
    assert [result["kind"] for result in (teacher, scaled, final)] == ["baseline"] * 2 + ["final"]
    assert len(final["rates"]) == 2 and final["tokens_read"] == 2048 and final["loss"] > 0
    for result in (teacher, scaled, final):
        measured = result["measured"]
        assert set(measured["text"]) == {"manuals", "news"}
        assert set(measured["text"]["news"]) == {"16", "64", "256", "512", "by_position"}
        assert {len(answers) for answers in measured["choices"].values()} == {3}
        assert set(measured["tasks"]["passkey"]) == {"256", "512"}


def test_the_teacher_is_the_teacher_and_scaling_costs_something(finished):
    text = {r["method"]: r["measured"]["text"]["news"] for r in read_results(finished)[4:]}
    for length in ("16", "64", "256"):
        assert text["teacher"][length]["kl"] == pytest.approx(0, abs=1e-6)
        assert text["scaled"][length]["kl"] > 1e-4
        assert text["logits+cpt"][length]["kl"] != text["scaled"][length]["kl"]


def test_the_report_names_both_stages(finished):
    page = (finished / "report" / "pretrained-tables.md").read_text()
    assert "| logits KL, then CPT | 0.002048M |" in page and "### PI x 2" in page


def test_rates_are_taken_one_per_stage(folder, capsys, monkeypatch):
    runs: list = []
    monkeypatch.setattr(
        "tools.study.pretrained.study._run_all", lambda options, given: runs.extend(given)
    )
    assert study("final", folder, *OPTIONS, "--rates", 0.25, 0.5, "--tokens", 64) == 0
    assert [(run.kind, run.rates) for run in runs][2:] == [("final", (0.25, 0.5))]
    assert study("final", folder, *OPTIONS, "--rates", 0.25) == 1
    assert "logits+cpt has 2 stages, and --rates gives 1" in one_error(capsys.readouterr().err)


def test_a_missing_part_is_named(folder, tmp_path, capsys):
    assert study("search", tmp_path, *OPTIONS) == 1
    assert "has no teacher/config.json" in one_error(capsys.readouterr().err)
    assert study("search", folder, *OPTIONS, "--domain", "poems") == 1
    assert "has no corpus/poems/train" in one_error(capsys.readouterr().err)
    assert study("report", tmp_path, *OPTIONS) == 1
    assert "run the command final first" in one_error(capsys.readouterr().err)
