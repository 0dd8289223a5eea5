"""The commands of ``megalard``, one module each: what they take, and what they do.

A command module has ``NAME``, ``HELP``, ``add_arguments(parser)`` and ``run(options)``, which
returns the exit status. With ``TAKES_OVERRIDES`` a command takes keys of the configuration too, and
its ``--help`` describes them. Modules with heavy imports are imported in ``run``, so that the help
is printed fast.
"""

from __future__ import annotations

import argparse

from megalard.config.lengths import parse_length
from megalard.errors import UserError


def tokens(text: str) -> int:
    """Return the number of tokens of an argument such as ``4096`` or ``4K``."""
    try:
        return int(text) if text[-1:].isdecimal() else parse_length(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
