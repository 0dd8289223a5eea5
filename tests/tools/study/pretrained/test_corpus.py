"""The corpus of a pre-trained model: which files are read, how they are cut and divided."""

from __future__ import annotations

import gzip
import json
from itertools import chain

import pytest

from megalard.data.token_store import TokenStore
from tests.command_line import one_error, tool
from tests.small_tokenizers import save_byte_tokenizer
from tools.study.pretrained import corpus

make_corpus = tool("study.pretrained.corpus")


def write(folder, files: dict[str, str | bytes]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


def test_a_page_of_html_becomes_text(tmp_path):
    page = """<html><head><title>no</title></head><body><nav>menu</nav><script>x = 1</script>
    <h1>A  title</h1><p>One\n paragraph &amp; more</p><ul><li>item</li></ul>
    <pre>  kept
      as it is</pre></body></html>"""
    folder = write(tmp_path, {"page.html": page})
    lines = [line for line in corpus.read_page(folder / "page.html").splitlines() if line.strip()]
    assert [line.strip() for line in lines] == [
        "A title",
        "One paragraph & more",
        "item",
        "kept",
        "as it is",
    ]
    assert "      as it is" in lines


def test_text_is_kept_but_for_white_space_at_ends(tmp_path):
    folder = write(tmp_path, {"a.txt.gz": "a  \n\n\n\nb\t\n", "b.txt": b"caf\xe9"})
    assert corpus.read_page(folder / "a.txt.gz") == "a\n\nb"
    assert corpus.read_page(folder / "b.txt") == "", "it is not UTF-8"


def test_a_directory_is_one_document_in_natural_order(tmp_path):
    long = "x" * 600
    write(
        tmp_path,
        {
            "manual/page10.txt": f"ten {long}",
            "manual/page9.md": f"nine {long}",
            "manual/page9.html": f"<p>nine again {long}</p>",
            "manual/code.py": f"code {long}",
            "other/notes.rst.gz": f"notes {long} {long}",
            "short/tiny.txt": "too short",
        },
    )
    documents = list(corpus.documents(tmp_path))
    assert documents == [f"nine {long}\n\nten {long}", f"notes {long} {long}"]


def test_long_text_is_cut_at_a_paragraph():
    paragraph = "w" * 99_998 + "\n\n"
    parts = list(corpus.cut(paragraph * 12))
    assert [len(part) for part in parts] == [499_998, 499_998, 200_000]
    assert all(len(part) <= 2**19 for part in corpus.cut("w" * 2**21))


def test_splits_share_no_document_and_have_their_shares():
    texts = [f"document {number} " * 20 for number in range(200)]
    splits = corpus.divide(texts + texts[:50])
    assert sorted(chain(*splits.values())) == sorted(texts)
    assert len(splits["test"]) == pytest.approx(20, abs=2)
    assert len(splits["validation"]) == pytest.approx(10, abs=2)
    assert corpus.divide(texts[::-1]) == splits, "the order of files decides nothing"


@pytest.fixture
def source(tmp_path):
    """Sixty documents, and a tokenizer with a second end token."""
    text = {f"d{n}/a.txt": f"number {n}. " * 120 for n in range(60)}
    (tmp_path / "model").mkdir()
    save_byte_tokenizer(tmp_path / "model")
    return write(tmp_path / "text", text)


@pytest.mark.parametrize(("words", "end"), [((), 256), (("--end-token", "!"), None)])
def test_every_document_ends_with_the_end_token(source, tmp_path, words, end, capsys):
    given = ("--model", tmp_path / "model", "--output", tmp_path / "out")
    assert make_corpus(*given, "--domain", f"plain={source}", *words) == 0
    printed = capsys.readouterr().out
    token = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert token == {"end_token": "!" if words else None}
    for split, least in (("train", 45), ("validation", 2), ("test", 5)):
        store = TokenStore.open(tmp_path / "out" / "plain" / split)
        count = len(store.documents) - 1
        assert count >= least and f"plain/{split}: {count} documents" in printed
        ends = set(store.tokens[store.documents[1:] - 1].tolist())
        assert len(ends) == 1 and (end is None or ends == {end})


def test_bad_input_is_refused_in_one_sentence(source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    given = ("--model", tmp_path / "model", "--output", tmp_path / "out")
    assert make_corpus(*given, "--domain", f"plain={tmp_path / 'empty'}") == 1
    assert "plain has too little text" in one_error(capsys.readouterr().err)
    for domain in ("plain", f"plain={tmp_path / 'none'}", f"Pla/in={source}"):
        with pytest.raises(SystemExit):
            make_corpus(*given, "--domain", domain)
        assert "is not NAME=DIR" in capsys.readouterr().err
