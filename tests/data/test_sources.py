"""Documents from text files, JSON Lines files and directories, and bad input named."""

from __future__ import annotations

import json
import os

import pytest

from megalard.data.formats import text_column
from megalard.data.sources import Text, list_files, read_documents, survey, total_bytes
from megalard.errors import UserError
from tests.command_line import user_error


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
    assert list(read_documents([file], text_column("body"))) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", r"a\.jsonl line 2 is not valid JSON"),
        (b"[" * 100_000, r"a\.jsonl line 2 is not valid JSON"),
        (b'["text"]', r"line 2 is not a JSON object"),
        (b'{"body": "x"}', r"line 2 has no key 'text' \(its keys: 'body'\)"),
        (b'{"text": null}', r"line 2 under 'text' has a NoneType"),
        (
            b'{"text": "\\ud800"}',
            r"line 2 under 'text' holds half of a surrogate pair",
        ),
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
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "link.txt").symlink_to(tmp_path / "nowhere.txt")
    for names, message in [
        (["missing.txt"], "missing.txt does not exist"),
        (["image.png"], "unsupported suffix '.png': give one of .* or a directory of them$"),
        (["table.csv"], "unsupported suffix '.csv': .* or a directory of them; write it as .jsonl"),
        (["empty"], "directory .*empty contains no .*: add some text"),
        (["broken"], "link.txt is not readable"),
        (["latin.txt"], "latin.txt is not UTF-8"),
        (["blank.txt"], "there is no text in .*blank.txt"),
        (["x" * 300], "cannot read .*: File name too long"),
        ([], "no data path was given"),
    ]:
        with pytest.raises(UserError, match=message):
            list(read_documents([tmp_path / name for name in names]))


def test_a_text_is_identified_by_its_files_and_by_its_documents(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    text = Text([file])
    assert text.files == Text([str(file)]).files == Text([tmp_path]).files
    assert Text([file], text_column("body")).files != text.files
    time = file.stat().st_mtime_ns
    os.utime(file, ns=(time, time + 10**9))
    assert Text([file]).files != text.files, "a file of the same size that was written later"
    os.utime(file, ns=(time, time))
    # The documents are those of any file with the same content.
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "b.jsonl"
    moved.write_text('{"text": "one"}\n')
    assert Text([moved]).content == text.content and Text([moved]).files != text.files
    assert Text([moved]).has_fingerprint(text.content, text.files)
    assert Text([file]).has_fingerprint("another", text.files)
    file.write_text("other")
    assert not Text([file]).has_fingerprint(text.content, text.files)


def test_documents_are_identified_with_their_borders(tmp_path):
    """Two documents are not the same text as one that is their concatenation."""
    one = write_lines(tmp_path / "a.jsonl", {"text": "ab"})
    two = write_lines(tmp_path / "b.jsonl", {"text": "a"}, {"text": "b"})
    assert Text([one]).content != Text([two]).content
    text = Text([two])
    assert list(text.documents()) == ["a", "b"]
    assert text.content == Text([two]).content


def test_files_of_other_kinds_are_passed_over_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "b.json").write_text("y" * 40)
    (tmp_path / "c.txt.zip").write_text("z" * 50)
    (tmp_path / "d").write_text("w")
    files, passed_over = survey([tmp_path])
    assert [file.name for file in files] == ["a.txt"]
    assert (passed_over.files, passed_over.bytes) == (3, 91)
    assert passed_over.suffixes == (".zip", ".json", "")
    assert passed_over.describe() == (
        f"3 files of 91 bytes (.zip, .json, no suffix), such as {tmp_path / 'b.json'}"
    )
    assert survey([tmp_path / "a.txt"]) == ([tmp_path / "a.txt"], None)


def test_a_directory_that_would_mostly_be_passed_over_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "data.csv").write_text("y" * 1000)
    sentence = user_error(list_files, [tmp_path])
    assert (
        f"most of the data directory {tmp_path} would be passed over: 1 files of 1,000" in sentence
    )
    assert sentence.endswith("Convert them to .jsonl, or give the text files by name")
    (tmp_path / "README.md").unlink()
    sentence = user_error(list_files, [tmp_path])
    assert (
        "contains no .txt, .md, .py, .jsonl, .parquet, .arrow file, only 1 files of 1,000 bytes "
        "(.csv)" in sentence
    )


def test_links_are_followed_and_a_circle_ends(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("one")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "parent").symlink_to(tmp_path / "real")
    assert [file.name for file in list_files([tmp_path / "data"])] == ["a.txt"]
