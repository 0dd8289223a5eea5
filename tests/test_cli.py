"""One way for every command to start, fail and end."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from megalard import __version__, cli
from megalard.errors import RankError, UserError
from tests.command_line import COMMANDS, megalard

CHECKOUT = Path(__file__).parents[1]
SCRIPTS = {
    "convert_hf": "convert",
    "evaluate": "evaluate",
    "inspect_checkpoint": "inspect",
    "prepare_data": "prepare",
    "verify_checkpoint": "verify",
}


def fail(error: BaseException):
    """Return a command that raises an error."""

    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(("status", "result"), [(None, 0), (0, 0), (1, 1), (2, 2)])
def test_a_command_gives_the_exit_status(status, result):
    assert cli.run(lambda: status) == result


def test_bad_input_is_one_sentence_and_status_1(capsys):
    assert cli.run(fail(UserError("the value 3 is bad: give 4"))) == 1
    assert capsys.readouterr() == ("", "megalard: error: the value 3 is bad: give 4\n")


def test_other_ranks_leave_the_report_to_rank_0(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cli.run(fail(UserError("x"))) == 1 and capsys.readouterr().err == ""
    # Except for damage that only this rank may see.
    assert cli.run(fail(RankError("x"))) == 1
    assert capsys.readouterr().err == "megalard: error: x\n"
    assert cli.run(fail(KeyboardInterrupt())) == 130 and capsys.readouterr().err == ""


def test_ctrl_c_is_status_130(capsys):
    assert cli.run(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "megalard: interrupted\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENOENT])
def test_a_disk_that_refuses_is_named_with_the_rank(number, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert cli.run(fail(OSError(number, os.strerror(number), "/out/metrics.jsonl"))) == 1
    assert capsys.readouterr().err == (
        f"megalard: error: rank 3 cannot read or write /out/metrics.jsonl: {os.strerror(number)}; "
        "what was saved before is untouched\n"
    )


def test_too_few_open_files_have_a_fix(capsys):
    assert cli.run(fail(OSError(errno.EMFILE, "Too many open files"))) == 1
    assert "Too many open files; raise the limit with ulimit -n" in capsys.readouterr().err


def test_a_file_name_cannot_write_lines_of_its_own(capsys):
    assert cli.run(fail(OSError(errno.ENOENT, "gone", "a\nmegalard: error: b\x1b[31m"))) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "\x1b" not in printed


def test_other_errors_are_bugs_and_keep_their_traceback():
    with pytest.raises(ConnectionError):
        cli.run(fail(ConnectionResetError(errno.ECONNRESET, "reset")))
    with pytest.raises(ZeroDivisionError):
        cli.run(fail(ZeroDivisionError()))


def test_a_gpu_without_memory_is_explained(capsys):
    assert cli.run(fail(torch.OutOfMemoryError("CUDA out of memory.\nmore"))) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("megalard: error: rank 0 ran out of GPU memory (CUDA out of memory.)")
    assert "raise parallel.tp or parallel.cp" in printed and printed.count("\n") == 1


def test_a_host_without_memory_is_explained(capsys):
    assert cli.run(fail(MemoryError())) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("megalard: error: rank 0 ran out of host memory: use a machine")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "x"}, "the environment variable RANK is 'x': torchrun sets it to a number"),
        ({"WORLD_SIZE": "-1"}, "the environment variable WORLD_SIZE is '-1'"),
        ({"LOCAL_RANK": "9" * 5000}, "the environment variable LOCAL_RANK is '999"),
        ({"RANK": "²"}, "the environment variable RANK is '²'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2: a rank is below"),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 3 and LOCAL_WORLD_SIZE is 1"),
    ],
)
def test_ranks_that_cannot_be_are_refused(variables, sentence, capsys, monkeypatch):
    """They would end in a traceback, or wait for ranks that do not exist."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.run(lambda: 0) == 1
    printed = capsys.readouterr().err
    assert sentence in printed and printed.count("\n") == 1


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        megalard("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"megalard {__version__}\n"


def test_the_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        megalard("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert set(COMMANDS) == set(cli.COMMANDS)
    for command in COMMANDS:
        assert re.search(rf"^    {command}\s", text, re.MULTILINE)
    assert "torchrun --nproc-per-node 8 -m megalard train" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        megalard(command, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: megalard {command} ") and len(text.splitlines()) > 15


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_tools_is_its_command(script, capsys, monkeypatch):
    module = __import__(f"tools.{script}", fromlist=["main"])
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: megalard {SCRIPTS[script]} ")
    # Without arguments it takes those of the process.
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["inspect", "x", "--jsn"], "unknown arguments: --jsn"),
        (["verify", "a", "b", "c"], "unknown arguments: c"),
        (["convert"], "the following arguments are required: direction"),
        (["prepare", "--model", "m", "text"], "the following arguments are required: --output"),
        (["evaluate", "m", "--output", "o", "--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_wrong_arguments_are_status_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        megalard(*words)
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


def test_options_are_not_abbreviated(capsys):
    """A new option would make an abbreviation ambiguous."""
    with pytest.raises(SystemExit):
        megalard("inspect", "x", "--no-check")
    assert "unknown arguments: --no-check" in capsys.readouterr().err


def test_only_the_module_of_the_command_is_imported(monkeypatch):
    names = []

    def import_module(name: str) -> types.ModuleType:
        names.append(name)
        return types.SimpleNamespace(
            HELP="x", add_arguments=lambda parser: None, run=lambda options: 3
        )

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    assert cli.main(["inspect"]) == 3
    assert names == ["megalard.commands.inspect"]


def test_torch_is_not_imported_for_help():
    """So that ``--help`` is fast."""
    program = (
        "import sys\nfrom megalard import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_ends_is_not_an_error(tmp_path):
    """As in ``megalard inspect ... | head``."""
    program = (
        "import sys\nfrom megalard import cli\n"
        "sys.exit(cli.run(lambda: [print('x' * 1000, flush=True) for _ in range(1000)] and 0))\n"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=CHECKOUT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        os.close(writer)
        os.read(reader, 10)
        os.close(reader)
        assert process.communicate(timeout=120) == (None, "") and process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_a_value_of_two_dashes_is_refused(capsys):
    """argparse takes the dashes for the end of options, and fails at the value that is gone."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", "export", "a", "b", "--file-size=--"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: --file-size=--: -- is not a value\n")
