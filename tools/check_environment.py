"""Exit with 0 if this Python has megalard's requirements, in the ranges of setup.py.

    python tools/check_environment.py [EXTRA]

Uses the standard library alone, apart from ``packaging``, which every pip environment carries.
"""

from __future__ import annotations

import ast
import sys
from importlib import metadata
from pathlib import Path


def requirements(extra: str) -> list[str]:
    """``install_requires`` of setup.py, and those of one extra."""
    tree = ast.parse((Path(__file__).parents[1] / "setup.py").read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and _name(n) == "setup")
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    wanted = ast.literal_eval(values["install_requires"])
    return wanted + (ast.literal_eval(values["extras_require"])[extra] if extra else [])


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def problems(extra: str) -> list[str]:
    """What is missing or of another version, in words."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging is not installed"]
    found = []
    for text in requirements(extra):
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version} is not in {requirement.specifier}")
    return found


if __name__ == "__main__":
    lacking = problems(sys.argv[1] if len(sys.argv) > 1 else "")
    print("\n".join(lacking), file=sys.stderr)
    sys.exit(bool(lacking))
