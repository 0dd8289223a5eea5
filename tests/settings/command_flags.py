"""The flags of every command, as its parser has them."""

from __future__ import annotations

import argparse
import importlib

from megalard import cli


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the long options of a parser and of its subcommands, except ``--help``."""
    words = {word for action in options_of(parser) for word in action.option_strings}
    return {word for word in words if word.startswith("--")} - {"--help"}


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the options of a parser and of its subcommands."""
    options = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                options += options_of(subparser)
        elif action.option_strings:
            options.append(action)
    return options


def parser_of_command(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"megalard.commands.{name}").add_arguments(parser)
    return parser


def flags_of_command(name: str) -> set[str]:
    return flags_of(parser_of_command(name))


def all_flags() -> dict[str, set[str]]:
    """Return the flags of all commands, by command."""
    return {name: flags_of_command(name) for name in cli.COMMANDS}
