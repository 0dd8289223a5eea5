"""Print a map of the code from the first sentences of its docstrings, or write it into a page.

  python -m tools.code_map                  one line per folder
  python -m tools.code_map --files          one line per file
  python -m tools.code_map --write          update the maps in README.md and docs/tour.md

A page holds a map between the lines ``<!-- map: folders -->`` (or ``files``) and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

from megalard import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "folders", "docs/tour.md": "files"}
# Folders whose files are not modules of a package, with what they hold.
_OTHER = {
    "tools/": "Command-line scripts; more are in bench/, campaigns/, quickstart/ and study/.",
    "launch/": "Start scripts for one node, several nodes and Slurm, and the recipes in configs/.",
    "tests/": "Tests in the folders of the package; parity/ compares whole steps with a reference.",
}


def code_map(kind: str) -> str:
    """Return a map of the code.

    Args:
        kind: ``folders`` for one line per folder, or ``files`` for one line per file.
    """
    lines = {"megalard/train.py": _first_sentence(ROOT / "megalard/train.py")}
    lines["megalard/cli.py"] = _first_sentence(ROOT / "megalard/cli.py")
    for file in _modules():
        path = file.relative_to(ROOT).as_posix()
        if file.name == "__init__.py":
            lines[path.removesuffix("__init__.py")] = _first_sentence(file)
        elif kind == "files":
            lines[path] = _first_sentence(file)
    lines |= _OTHER
    width = max(map(len, lines)) + 2
    return "\n".join(f"{path:<{width}}{text}" for path, text in lines.items())


def _modules() -> list[Path]:
    """Return the modules of the package and the kernels: each folder before its files."""
    files = []
    for folder in ("megalard", "kernels"):
        files += [
            file
            for file in (ROOT / folder).rglob("*.py")
            if "megalard/kernels/relation_kl" not in file.as_posix()
            and file != ROOT / "megalard/__init__.py"
        ]

    def place(file: Path) -> tuple:
        path = file.relative_to(ROOT)
        return (path.parent.as_posix(), file.name != "__init__.py", file.name)

    return sorted(files, key=place)


def _first_sentence(file: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split())
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0].replace("``", "")


def renewed(page: str) -> str:
    """Return the text of a page with its map made again."""
    text = (ROOT / page).read_text(encoding="utf-8")
    kind = PAGES[page]
    pattern = rf"(<!-- map: {kind} -->\n).*?(<!-- end -->)"
    block = f"```text\n{code_map(kind)}\n```\n"
    return re.sub(pattern, lambda match: match[1] + block + match[2], text, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> int:
    """Print or write the maps; return the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="one line per file")
    parser.add_argument("--write", action="store_true", help="update the maps in the pages")
    options = parser.parse_args(arguments)

    def work() -> None:
        if options.write:
            for page in PAGES:
                (ROOT / page).write_text(renewed(page), encoding="utf-8")
        else:
            print(code_map("files" if options.files else "folders"))

    return cli.run(work)


if __name__ == "__main__":
    sys.exit(main())
