"""Questions in files."""

from __future__ import annotations

from tools.study.pretrained.questions import Question, read_questions, write_questions

QUESTIONS = [
    Question(["The sky is", "The sky is"], [" gray", " red"], 0, True),
    Question(["", ""], ["Qui a \u00e9t\u00e9?", "\u00e9t\u00e9 qui?"], 1, False),
]


def test_questions_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "task.jsonl.gz"
    write_questions(path, QUESTIONS)
    assert read_questions(path) == QUESTIONS
    content = path.read_bytes()
    write_questions(path, QUESTIONS)
    assert path.read_bytes() == content, "the file has a date"
