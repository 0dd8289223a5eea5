"""Documents from text files, JSON Lines files and directories, and bad input named."""

from __future__ import annotations

import json

import pytest

from megalard.data.sources import fingerprint, list_files, read_documents, total_bytes
from megalard.errors import UserError


def write_lines(path, *lines):
    """Write lines, given as bytes or as values for JSON; return the path."""
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return path


def test_files_directories_and_json_lines_are_read_in_order(tmp_path):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "b" / "two.md").write_text("two")
    (folder / "a.py").write_text("one")
    (folder / "image.png").write_bytes(b"\xff")
    write_lines(folder / "c.jsonl", {"text": "three"}, b"", {"text": "  "}, {"text": "four\u2028é"})
    first = tmp_path / "first.TXT"
    first.write_bytes(b"\xef\xbb\xbfzero\r\n")
    read = []
    texts = list(read_documents([first, folder], advance=read.append))
    assert texts == ["zero\r\n", "one", "two", "three", "four\u2028é"]
    assert sum(read) == total_bytes([first, folder])


def test_the_key_of_the_text_can_be_chosen(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", {"body": "x", "text": "y"})
    assert list(read_documents([file], text_key="body")) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", r"a\.jsonl line 2 is not valid JSON"),
        (b"[" * 100_000, r"a\.jsonl line 2 is not valid JSON"),
        (b'["text"]', r"line 2 is not a JSON object"),
        (b'{"body": "x"}', r"line 2 has no key 'text' \(its keys: 'body'\)"),
        (b'{"text": null}', r"line 2 has a NoneType under 'text'"),
        (b'{"text": "\\ud800"}', r"line 2 holds half of a surrogate pair at character 0"),
        (b'{"text": "\xff"}', r"line 2 is not UTF-8 \(byte 10 is 0xff\)"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    file = write_lines(tmp_path / "a.jsonl", {"text": "fine"}, line)
    with pytest.raises(UserError, match=message):
        list(read_documents([file]))


def test_bad_paths_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.png").write_bytes(b"\xff")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "link.txt").symlink_to(tmp_path / "nowhere.txt")
    for names, message in [
        (["missing.txt"], "missing.txt does not exist"),
        (["image.png"], "unsupported suffix '.png'"),
        (["empty"], "directory .*empty contains no"),
        (["broken"], "link.txt is not readable"),
        (["latin.txt"], "latin.txt is not UTF-8"),
        (["blank.txt"], "there is no text in .*blank.txt"),
        ([], "no data path was given"),
    ]:
        with pytest.raises(UserError, match=message):
            list(read_documents([tmp_path / name for name in names]))


def test_the_fingerprint_depends_on_paths_sizes_times_and_key(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = fingerprint([file])
    assert fingerprint([str(file)]) == before == fingerprint(list_files([tmp_path]))
    assert fingerprint([file], text_key="body") != before
    file.write_text("other")
    assert fingerprint([file]) != before
