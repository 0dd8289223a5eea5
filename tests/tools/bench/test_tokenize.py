"""The comparison of tokenizing with the package datasets, on a few documents."""

from __future__ import annotations

import json

import pytest

from tests.small_tokenizers import save_byte_tokenizer
from tools.bench import tokenize


def test_both_write_the_same_number_of_tokens(tmp_path, capsys):
    pytest.importorskip("datasets")
    (tmp_path / "model").mkdir()
    save_byte_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    lines = [json.dumps({"text": "some words " * n}) for n in range(1, 30)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    words = ["--model", tmp_path / "model", tmp_path / "text.jsonl", "--repeats", 1]
    assert tokenize.main([*map(str, words), "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert f"{sum(11 * n for n in range(1, 30)):,} tokens" in printed
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(result["seconds"]) == [
        "megalard prepare",
        "datasets, threads",
        "datasets, processes",
    ]
