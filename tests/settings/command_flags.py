"""The flags of every command, as its parser has them."""

from __future__ import annotations

import argparse
import importlib

from megalard import cli


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the long options of a parser and of its subcommands, except ``--help``."""
    flags = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                flags |= flags_of(subparser)
        else:
            flags |= {word for word in action.option_strings if word.startswith("--")}
    return flags - {"--help"}


def flags_of_command(name: str) -> set[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"megalard.commands.{name}").add_arguments(parser)
    return flags_of(parser)


def all_flags() -> dict[str, set[str]]:
    """Return the flags of all commands, by command."""
    return {name: flags_of_command(name) for name in cli.COMMANDS}
