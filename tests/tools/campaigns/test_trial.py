"""How a command ended: well, or with what is wrong."""

from __future__ import annotations

import sys
import time

import pytest

from megalard import cli
from megalard.errors import UserError
from tools.campaigns.trial import judge, try_call, try_command


def fail(error: BaseException):
    def call():
        raise error

    return lambda: cli.run(call)


def test_success_and_a_sentence_are_good():
    assert try_call(lambda: 0).kind == "done"
    trial = try_call(fail(UserError("a is b: give c")))
    assert (trial.kind, trial.status) == ("refused", 1) and trial.is_good
    assert trial.detail == "megalard: error: a is b: give c"
    assert try_command(["inspect", "/nowhere"]).kind == "refused"
    assert try_command(["no-such-command"]).kind == "refused"  # argparse's usage and error


def test_a_traceback_a_wait_and_control_characters_are_bad():
    trial = try_call(fail(KeyError("x")))
    assert trial.kind == "traceback" and "KeyError: 'x' at" in trial.detail
    assert try_call(lambda: time.sleep(30), 1).kind == "hang"
    assert try_call(lambda: print("a\x1b]0;b")).kind == "control characters"
    assert try_call(lambda: print("Traceback (most recent call last):")).kind == "traceback"

    def two() -> int:
        print("megalard: error: one", file=sys.stderr)
        print("megalard: error: two", file=sys.stderr)
        return 1

    assert try_call(two).kind == "no sentence"
    assert not any(try_call(call).is_good for call in (two, fail(KeyError("x"))))


@pytest.mark.parametrize(
    ("status", "out", "err", "kind"),
    [
        (1, "", "", "no sentence"),
        (1, "3 tensors differ\n", "", "refused"),
        (1, "", "something\nmegalard: error: x\n", "refused"),
        (1, "", "megalard: error: x\nand more\n", "no sentence"),
        (2, "", "usage: x\nx: error: y\n", "refused"),
        (1, "", "megalard: error: " + "x" * 5000 + "\n", "no sentence"),
        (0, "\x1b[31mred\x1b[0m\n", "", "done"),
    ],
)
def test_what_is_printed_decides(status, out, err, kind):
    assert judge(status, out, err).kind == kind
