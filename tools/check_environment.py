"""Exit with 0 if this Python has megalard's requirements, in the ranges of pyproject.toml.

    python tools/check_environment.py [EXTRA]

The script prints missing requirements on stderr. It uses only the standard library, ``packaging``,
which every pip environment has, and for Python 3.10 ``tomli``, which pip includes.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path


def requirements(extra: str) -> list[str]:
    """Return the dependencies of pyproject.toml, with those of one extra."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + (project["optional-dependencies"][extra] if extra else [])


def problems(extra: str) -> list[str]:
    """Return what is missing or has another version, in words."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging is not installed"]
    lines = []
    for text in requirements(extra):
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            lines.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            lines.append(f"{requirement.name} {version} is not in {requirement.specifier}")
    return lines


if __name__ == "__main__":
    lines = problems(sys.argv[1] if len(sys.argv) > 1 else "")
    print("\n".join(lines), file=sys.stderr)
    sys.exit(bool(lines))
