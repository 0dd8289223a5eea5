"""The pages of the documentation taken apart: code blocks, links, and the commands of a console."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.processes import CHECKOUT

PAGES = [
    *(CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((CHECKOUT / "docs").glob("*.md")),
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        language: what the fence says; ``indented`` for a block without a fence.
    """

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


def prose(page: Path) -> str:
    """Return a page without its fenced blocks; lines keep their numbers."""
    text = page.read_text(encoding="utf-8")
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def blocks(page: Path) -> list[Block]:
    """Return all code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    fenced = [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]
    indented, lines = [], prose(page).splitlines()
    start = None
    for number, line in enumerate([*lines, ""]):
        is_code = line.startswith("    ")
        if is_code and start is None and (number == 0 or not lines[number - 1].strip()):
            start = number
        elif not is_code and start is not None:
            content = "\n".join(row[4:] for row in lines[start:number]) + "\n"
            indented.append(Block(page, start + 1, "indented", content))
            start = None
    return fenced + indented


def commands(block: Block) -> list[str]:
    """Return the commands of a block, each in one line and without the text next to it."""
    joined = re.sub(r"\s*\\\n\s*", " ", block.text)
    lines = [re.split(r"\s{2,}|\s#\s", line.strip())[0] for line in joined.splitlines()]
    return [line for line in lines if line]


def words(command: str) -> list[str]:
    """Return the words of a command, without the variables that are set before it."""
    parts = shlex.split(command)
    while parts and re.fullmatch(r"[A-Z_]+=.*", parts[0]):
        parts = parts[1:]
    return parts


def links(page: Path) -> list[str]:
    """Return the targets of a page's relative links."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code_spans(page: Path) -> list[str]:
    """Return what stands in backticks in the text of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))
