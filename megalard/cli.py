"""One way for every command of the project to start, fail and end.

The exit status is 0 for success, 1 for bad input or a difference that the command looks for, 2 for
wrong arguments, and 130 after Ctrl-C. A ``UserError`` is printed as one sentence on one rank, or by
``megalard.launcher``.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from megalard import __version__
from megalard.error_file import leave_reason
from megalard.errors import DiskError, RankError, UserError, printable, shown

COMMANDS = (
    "train",
    "plan",
    "preflight",
    "evaluate",
    "report",
    "prepare",
    "convert",
    "inspect",
    "verify",
    "push",
)

_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)

_DESCRIPTION = """\
Restore the short-text quality of a language model whose context window was extended by scaling its
RoPE (LinearARD, arXiv 2604.00004)."""

_EPILOG = """\
`megalard COMMAND --help` describes a command. On several GPUs, start `train`, `preflight`,
`evaluate` and `convert` with torchrun, as in

  torchrun --nproc-per-node 8 -m megalard train --config FILE --parallel.tp 4

or train with launch/train.sh, which also handles several nodes, restarts and signals."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, whatever words it was given.

    Attributes:
        takes_overrides: whether the help describes the configuration's keys. The description is
            made when it is printed, because it reads the sources of the configuration.
    """

    takes_overrides = False

    def format_help(self) -> str:
        if self.takes_overrides:
            from megalard.config.help import describe_keys

            self.epilog = "configuration keys:\n\n" + describe_keys()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _print_any_name()
    # Only the module of the command in question is imported.
    chosen = words[0] if words and words[0] in COMMANDS else None
    parser = Parser(
        prog="megalard",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megalard {__version__}")
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {name: _command(name) for name in COMMANDS if chosen in (None, name)}
    for name, module in modules.items():
        subparser = parsers.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subparser.takes_overrides = _takes_overrides(module)
        module.add_arguments(subparser)
    # argparse would remove the value -- from such a word and then fail.
    empty = [word for word in words if word.startswith("--") and word.endswith("=--")]
    if empty:
        parser.error(f"{empty[0]}: -- is not a value")
    options, rest = parser.parse_known_args(words)
    options.rest = rest
    module = modules[options.command]
    if rest and not _takes_overrides(module):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return run(lambda: module.run(options))


def command(name: str) -> Callable[[Sequence[str] | None], int]:
    """Return a function that runs one command with the given or the process's arguments."""

    def main_of_command(arguments: Sequence[str] | None = None) -> int:
        return main([name, *(sys.argv[1:] if arguments is None else arguments)])

    return main_of_command


def run(command: Callable[[], int | None], name: str = "megalard") -> int:
    """Call a command and return its exit status, with every expected failure in one sentence."""
    rank = 0

    def report(sentence: str, is_bad_input: bool = False, is_for_every_rank: bool = False) -> None:
        """Leave a sentence for the launcher, or print it if the launcher does not."""
        sentence = printable(sentence)
        is_printed_by_launcher = leave_reason(sentence, is_bad_input)
        if not is_printed_by_launcher and (rank == 0 or not is_for_every_rank):
            print(f"{name}: error: {sentence}", file=sys.stderr, flush=True)

    try:
        rank = _checked_rank()
        return command() or 0
    except UserError as error:
        report(
            str(error),
            is_bad_input=not isinstance(error, DiskError),
            is_for_every_rank=not isinstance(error, RankError),
        )
        return 1
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{name}: interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # The reader of the output, such as `head`, has ended; nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        path = f" {error.filename}" if error.filename else ""
        fix = "; raise the limit with ulimit -n" if error.errno in _TOO_MANY_FILES else ""
        report(
            f"rank {rank} cannot read or write{path}: {error.strerror}{fix}; what was saved before "
            "is untouched"
        )
        return 1
    except MemoryError:
        report(
            f"rank {rank} ran out of host memory: use a machine with more of it, or smaller files, "
            "lengths or batches; what was saved before is untouched"
        )
        return 1
    except Exception as error:
        if not _is_out_of_gpu_memory(error):
            raise
        report(
            f"rank {rank} ran out of GPU memory ({str(error).splitlines()[0]}): raise "
            "parallel.tp or parallel.cp, set parallel.activation_checkpointing true, or lower "
            "optimizer.micro_batch or data.context_length (evaluate: --tp, --cp, --lengths)"
        )
        return 1
    finally:
        _leave_process_group()


def _checked_rank() -> int:
    """Return this process's rank, after a check of the variables that torchrun sets.

    Raises:
        UserError: a variable is no number, or a rank is not below the number of ranks.
    """
    for rank_name, size_name in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        for name in (rank_name, size_name):
            text = os.environ.get(name, "0")
            if not (text.isascii() and text.isdecimal() and len(text) < 10):
                raise UserError(
                    f"the environment variable {name} is {shown(text)}: torchrun sets it to a "
                    "number; unset it, or start with torchrun"
                )
        rank, size = os.environ.get(rank_name, "0"), os.environ.get(size_name)
        if size is not None and int(rank) >= int(size):
            raise UserError(
                f"the environment variable {rank_name} is {rank} and {size_name} is {size}: a rank "
                "is below the number of ranks; unset both, or start with torchrun"
            )
    return int(os.environ.get("RANK", "0"))


def _print_any_name() -> None:
    """Escape what the encoding of the output lacks, such as bytes of names that are not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_out_of_gpu_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _leave_process_group() -> None:
    """Leave torch.distributed, if the command has joined it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _takes_overrides(module: ModuleType) -> bool:
    """Whether a command's words may be keys of the configuration."""
    return getattr(module, "TAKES_OVERRIDES", False)


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"megalard.commands.{name}")


if __name__ == "__main__":
    sys.exit(main())
