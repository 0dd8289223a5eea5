import json
import runpy
import sys
from pathlib import Path

import pytest
from data_helpers import save_fast

from megalard.data.token_store import TokenStore

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a tool in this process; gives its exit status, stdout and stderr."""

    def run(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def model(tmp_path):
    return save_fast(tmp_path / "model", eos_token="</s>")


def test_prepare_data_writes_reuses_and_refuses(tmp_path, model, run):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox")
    output = tmp_path / "store"
    for _ in range(2):
        status, out, err = run("prepare_data.py", "--model", model, "--output", output, text)
        assert status == 0, err
        assert "tokens in 1 documents" in out
    assert TokenStore.open(output).tokens[-1] == 1

    text.write_text("other text")
    status, out, err = run("prepare_data.py", "--model", model, "--output", output, text)
    assert (status, out) == (1, "")
    assert err.startswith("megalard: error: token store") and err.count("\n") == 1


def test_prepare_data_tells_errors_in_one_sentence(tmp_path, model, run):
    arguments = ("--model", model, "--output", tmp_path / "o", tmp_path / "no.txt")
    status, out, err = run("prepare_data.py", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("megalard: error: data path") and err.count("\n") == 1
    assert not (tmp_path / "o").exists()
    status, out, _ = run("prepare_data.py", "--help")
    assert status == 0 and "--text-key" in out


def test_stdlib_text_makes_three_splits_that_share_nothing(tmp_path, run):
    status, _, err = run("quickstart/stdlib_text.py", tmp_path / "text")
    assert status == 0, err
    records = {
        name: [json.loads(line) for line in (tmp_path / "text" / f"{name}.jsonl").open()]
        for name in ("train", "validation", "heldout")
    }
    texts = [record["text"] for split in records.values() for record in split]
    sources = [record["source"] for split in records.values() for record in split]
    assert len(set(texts)) == len(texts) and len(set(sources)) == len(sources)
    assert len(records["train"]) > 5 * len(records["heldout"]) > 5 * len(records["validation"]) > 0
    assert not any({"test", "tests", "encodings"} & set(Path(s).parts) for s in sources)
    assert not any("site-packages" in s or "_sysconfigdata" in s for s in sources)
