"""The command lines of the tools: fast help, one spelling of each flag, errors before the work."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from tools import command_line

# Every tool that measures, studies or makes something for the quickstart.
TOOLS = (
    "bench.authors",
    "bench.checkpoint",
    "bench.checkpoint_worker",
    "bench.context",
    "bench.relation",
    "bench.step",
    "quickstart.pretrain_teacher",
    "quickstart.stdlib_text",
    "mutation.run",
    "study.corpus",
    "study.pretrained.choice_files",
    "study.pretrained.corpus",
    "study.pretrained.study",
    "study.restoration",
)
HELP = """
import contextlib, importlib, io, sys
for name in sys.argv[1:]:
    module = importlib.import_module(f"tools.{name}")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            module.main(["--help"])
    except SystemExit as end:
        assert end.code == 0, name
    text = printed.getvalue()
    assert text.startswith(f"usage: python -m tools.{name} "), name
    assert module.__doc__.splitlines()[0] in text, name
    assert "torch" not in sys.modules, name
    print(name, *(word for word in text.split() if word.startswith("--")))
"""


@pytest.fixture(scope="module")
def flags():
    """The flags in the help of every tool, by tool; made in a process that has no torch."""
    command = [sys.executable, "-c", HELP, *TOOLS]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = (line.split() for line in run.stdout.splitlines())
    return {name: set(words) for name, *words in lines}


def test_every_tool_explains_itself_without_torch(flags):
    assert set(flags) == set(TOOLS)


def test_one_thing_has_one_flag(flags):
    assert {"--tp", "--cp", "--device", "--dtype", "--repeats", "--json"} <= flags["bench.step"]
    assert "--activation-checkpointing" in flags["bench.step"]
    assert {"--device", "--dtype", "--repeats", "--json"} <= flags["bench.context"]
    assert {"--device", "--repeats", "--json"} <= flags["bench.relation"]
    assert {"--device", "--tp", "--json"} <= flags["bench.checkpoint"]
    for name in ("study.corpus", "study.restoration", "quickstart.stdlib_text"):
        assert "--output" in flags[name]


def test_help_shows_defaults_and_no_meaningless_ones():
    parser = command_line.make_parser("tools.example", "An example.")
    parser.add_argument("--rate", type=float, default=0.0, help="a rate")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2], help="some lengths")
    parser.add_argument("--switch", action="store_true", help="a switch")
    parser.add_argument("--file", help="a file")
    text = parser.format_help()
    assert "a rate (default: 0.0)" in text and "some lengths (default: 1 2)" in text
    assert "a switch\n" in text and "a file\n" in text


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        (command_line.at_least(1), "0", "0 is too small: give 1 or more"),
        (command_line.above(0, float), "0", "0 is too small: give more than 0"),
        (command_line.above(0, float), "nan", "nan is too small: give more than 0"),
        (command_line.share, "1", "1 is not a share: give 0 or more, and less than 1"),
    ],
)
def test_values_out_of_range_are_refused(kind, text, sentence):
    with pytest.raises(argparse.ArgumentTypeError, match=sentence):
        kind(text)


def test_a_number_is_refused_as_argparse_refuses_it(capsys):
    parser = command_line.make_parser("tools.example", "An example.")
    command_line.add_repeats(parser, 3)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--repeats", "many"])
    assert end.value.code == 2
    assert "argument --repeats: invalid int value: 'many'" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    parser = command_line.make_parser("tools.example", "An example.")
    command_line.add_json(parser)
    assert parser.parse_args(["--json", str(tmp_path / "new.json")]).json == tmp_path / "new.json"
    for path, sentence in (
        (tmp_path, f"{tmp_path} is a directory: give the name of a file"),
        (tmp_path / "none" / "x", f"there is no directory {tmp_path / 'none'}: make it first"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(["--json", str(path)])
        assert sentence in capsys.readouterr().err
