"""Documents from files: which domain a file belongs to, and how its text is cleaned."""

from __future__ import annotations

import gzip

import pytest

from tools.study import documents


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("train.py", "python"),
        ("cuda_fp16.hpp", "c"),
        ("kernel.cu", "c"),
        ("index.rst", "prose"),
        ("README", "prose"),
        ("README.Debian", "prose"),
        ("changelog.gz", "prose"),
        ("METADATA", "prose"),
        ("LICENSE.txt", "licenses"),
        ("copyright", "licenses"),
        ("COPYING.LIB", "licenses"),
        ("license.py", "python"),
        ("requirements-dev.txt", None),
        ("top_level.txt", None),
        ("CMakeLists.txt", None),
        ("data.gz", None),
        ("image.png", None),
    ],
)
def test_the_name_of_a_file_decides_its_domain(name, domain):
    assert documents.domain_of(name) == domain


def test_code_loses_long_docstrings_and_they_become_prose():
    long = "Explains at length what this does.\n\n" + "    And why it does so.\n" * 20
    source = f'import os\n\n\ndef f(x):\n    """{long}    """\n    """kept"""\n    return x\n'
    short = '\n\ndef g():\n    """Short."""\n    return 1\n'
    code, prose = documents.take_docstrings(source + short)
    assert "at length" not in code and "return x" in code and '"""Short."""' in code
    assert prose.startswith("Explains at length") and "\nAnd why it does so." in prose
    assert documents.take_docstrings("def broken(:") == ("def broken(:", "")


def test_sources_lose_the_license_that_they_begin_with():
    license_text = "/* Copyright 2020\n * All rights reserved. */\n// more\n\n"
    assert documents.without_license(license_text + "int x;\n") == "int x;\n"
    assert documents.without_license("# License: MIT\n#\nimport os\n") == "import os\n"
    kept = "/* What this header is for. */\nint x;\n"
    assert documents.without_license(kept) == kept


def test_files_that_are_not_text_are_left_out(tmp_path):
    good = "A line of words that is read.\n" * 20
    for name, raw in {
        "good.txt": good.encode(),
        "good.txt.gz": gzip.compress(good.encode()),
        "short.txt": b"tiny\n",
        "binary.txt": bytes(range(256)) * 4,
        "table.txt": b"1.25 3.50 8.75\n" * 50,
        "minified.txt": b"word " * 500,
        "broken.txt.gz": b"\x1f\x8b" + bytes(300),
    }.items():
        (tmp_path / name).write_bytes(raw)
        expected = good if name.startswith("good") else None
        assert documents.read_text(tmp_path / name) == expected, name


def test_a_folder_below_two_roots_belongs_to_the_inner_one(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text("")
    (tmp_path / "b.py").write_text("")
    files = documents.find_files([tmp_path, tmp_path / "inner"])["python"]
    root = tmp_path.resolve()
    assert sorted(files) == [(root, "b.py"), (root / "inner", "a.py")]
    assert documents.find_files([tmp_path / "inner", tmp_path])["python"] == files


def test_a_python_file_gives_code_and_prose(tmp_path):
    docstring = "A sentence of the docstring, which is long enough.\n" * 6
    (tmp_path / "m.py").write_text(f'"""{docstring}"""\n' + "value = compute(value)\n" * 20)
    code, prose = documents.read_documents("python", (tmp_path, "m.py"))
    assert (code.domain, prose.domain) == ("python", "prose")
    assert (code.source, prose.source) == ("m.py", "m.py#docstrings")
    assert code.split == prose.split == documents.split_of("m.py")
    assert "docstring" not in code.text and "compute" not in prose.text
    assert len(code.passages) == len(code.weights) > 0 and code.size == len(code.text)
