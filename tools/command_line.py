"""The parser and the flags that the command lines of the tools share.

A flag has the same name and help text in every tool. Nothing here imports torch, so that ``--help``
is fast: a tool imports torch after it has parsed its arguments. Every tool runs under
``megalard.cli.run``, which prints errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megalard import cli

CHECKPOINTING = {"no": [False], "yes": [True], "both": [False, True]}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """A formatter that keeps the lines of a description and adds defaults to help texts."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        has_none = any(default is nothing for nothing in (None, False, argparse.SUPPRESS))
        if text is None or has_none or not action.option_strings:
            return text
        if isinstance(default, (list, tuple)):
            return f"{text} (default: {' '.join(map(str, default))})"
        return f"{text} (default: %(default)s)"


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a tool.

    Args:
        module: the module that is run, such as ``tools.bench.step``.
        description: the docstring of the module.
    """
    return cli.Parser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


def at_least(minimum: float, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """Return a type for arguments that must not be smaller than ``minimum``."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"{text} is too small: give {minimum} or more")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


def above(limit: float, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """Return a type for arguments that must be larger than ``limit``."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value > limit:
            raise argparse.ArgumentTypeError(f"{text} is too small: give more than {limit}")
        return value

    parse.__name__ = kind.__name__
    return parse


def share(text: str) -> float:
    """Return a number from 0 to just below 1; a type for arguments."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: give 0 or more, and less than 1")
    return value


def _new_file(text: str) -> Path:
    """Return the path of a file to write; refuse a bad path before the work begins."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory: give the name of a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}: make it first")
    return path


def add_device(parser: argparse._ActionsContainer) -> None:
    """Declare ``--device`` in a parser or in a group of its arguments."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto takes a GPU if torch sees one",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare ``--dtype``."""
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="dtype of activations and frozen weights",
    )


def add_parallel(parser: argparse.ArgumentParser) -> None:
    """Declare ``--tp`` and ``--cp``."""
    parser.add_argument(
        "--tp", type=at_least(1), default=1, metavar="N", help="tensor-parallel size"
    )
    parser.add_argument(
        "--cp",
        type=at_least(1),
        default=1,
        metavar="N",
        help="context-parallel size; the ranks that remain are data-parallel",
    )


def add_activation_checkpointing(parser: argparse.ArgumentParser) -> None:
    """Declare ``--activation-checkpointing``."""
    parser.add_argument(
        "--activation-checkpointing",
        choices=tuple(CHECKPOINTING),
        default="both",
        help="whether the backward pass computes each student layer again; both measures both",
    )


def add_repeats(parser: argparse.ArgumentParser, default: int) -> None:
    """Declare ``--repeats``."""
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        default=default,
        metavar="N",
        help="measurements, of which the median is reported; warm-up runs come first",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare ``--json``."""
    parser.add_argument(
        "--json",
        type=_new_file,
        metavar="FILE",
        help="also write the environment, the options and all results to this file",
    )


def add_output(parser: argparse.ArgumentParser, content: str, required: bool = True) -> None:
    """Declare ``--output``.

    Args:
        content: the help text, which names the content of the directory.
    """
    parser.add_argument("--output", type=Path, required=required, metavar="DIR", help=content)


def add_seed(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Declare ``--seed``.

    Args:
        purpose: what the seed decides, for the help text.
    """
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help=f"seed of {purpose}"
    )


def add_seconds(parser: argparse.ArgumentParser) -> None:
    """Declare ``--seconds``, after which a study starts no run."""
    parser.add_argument(
        "--seconds",
        type=at_least(0, float),
        metavar="S",
        help="start no run after this time (default: no limit)",
    )


def add_workers(parser: argparse.ArgumentParser, default: int, work: str) -> None:
    """Declare ``--workers``.

    Args:
        work: what the processes do, for the help text.
    """
    parser.add_argument(
        "--workers", type=at_least(1), default=default, metavar="N", help=f"processes that {work}"
    )
