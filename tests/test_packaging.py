"""The wheel has the kernels and recipes inside megalard, and nothing shadows other packages."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import megalard
from tests.command_line import COMMANDS
from tests.processes import CHECKOUT, finished

# transformers looks for a PyPI package called kernels, for which ours must not be taken.
IMPORT_KERNELS = """
import importlib.util
import megalard.kernels.relation_kl as relation_kl
spec = importlib.util.find_spec("kernels")
origin = spec and spec.origin
assert origin is None or "site-packages" in origin, f"{origin} shadows the PyPI package kernels"
print(relation_kl.__file__)
"""
IMPORTS = f"""{IMPORT_KERNELS}
from transformers import LlamaForCausalLM
import megalard.train
megalard.train.main(["--help"])
"""

# Every command of the wheel prints its help, and a recipe is read by its name.
IMPORT_COMMANDS = """
import contextlib, io
from megalard import cli
from megalard.config.file import load_config
from megalard.config.schema import ROPE_TYPES
for name in cli.COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            cli.main([name, "--help"])
        except SystemExit as end:
            assert end.code == 0, name
    assert f"usage: megalard {name}" in printed.getvalue(), name
given = ["--model.teacher=m", "--data.paths=d", "--run.output=o", "--stages.long.data.paths=l"]
config = load_config("linearard-llama2-7b-x8", given)
assert config.rope.factor == 8 and len(config.stages) == 2, config
print(", ".join(ROPE_TYPES))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that the checkout gets no build folders."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("megalard", "kernels", "launch/configs", "tools", "tests"):
        hidden = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(CHECKOUT / name, source / name, ignore=hidden, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(CHECKOUT / name, source)
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", *command, "--wheel-dir", folder, source]
    done = finished(command)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel):
    """The folder of an unpacked wheel, which is on no search path."""
    folder = wheel.parent / "unpacked"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(*command: str, path: Path, folder: Path) -> str:
    """Run Python in a folder with one entry in PYTHONPATH; return what it printed."""
    environment = {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = finished([sys.executable, *command], cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_wheel_has_megalard_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"megalard"}
    source = wheel.parent / "source"
    expected = {
        str(Path("megalard") / inside / file.relative_to(source / folder))
        for folder, inside in (("megalard", ""), ("kernels", "kernels"))
        for file in (source / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert "megalard/kernels/relation_kl/__init__.py" in names


def test_the_wheel_has_a_console_command(wheel):
    (entry,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("entry_points.txt"))
    assert b"megalard = megalard.cli:main" in zipfile.ZipFile(wheel).read(entry)


def test_the_wheel_has_the_recipes(wheel):
    archive = zipfile.ZipFile(wheel)
    recipes = {
        file.name: file.read_bytes()
        for file in (CHECKOUT / "launch" / "configs").glob("*")
        if file.suffix == ".yaml"
    }
    assert len(recipes) > 10
    for name, content in recipes.items():
        assert archive.read(f"megalard/recipes/{name}") == content


def test_the_wheel_is_typed_and_described(wheel):
    archive = zipfile.ZipFile(wheel)
    assert "megalard/py.typed" in archive.namelist()
    (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = archive.read(path).decode()
    assert f"\nVersion: {megalard.__version__}\n" in metadata
    assert (CHECKOUT / "README.md").read_text(encoding="utf-8") in metadata
    # The kernels are mapped into the package and have no second copy next to it.
    assert not any(name.startswith("kernels/") for name in archive.namelist())


def test_the_commands_work_from_the_wheel(unpacked, tmp_path):
    version = run("-m", "megalard", "--version", path=unpacked, folder=tmp_path)
    assert version == f"megalard {megalard.__version__}"
    usage = run("-m", "megalard", "--help", path=unpacked, folder=tmp_path)
    for name in COMMANDS:
        assert re.search(rf"^ +{name}\b", usage, re.MULTILINE), name
    printed = run("-c", IMPORT_COMMANDS, path=unpacked, folder=tmp_path)
    assert printed.startswith("linear, abf")


def test_the_unpacked_wheel_works_anywhere(unpacked, tmp_path):
    """What else it imports is the same files as in the checkout."""
    printed = run("-c", IMPORT_KERNELS, path=unpacked, folder=tmp_path)
    inside = unpacked / "megalard" / "kernels" / "relation_kl" / "__init__.py"
    assert printed == str(inside)


def test_the_modules_run_from_the_checkout():
    """In the checkout, the root with its folder ``kernels`` is first in sys.path."""
    place, *printed = run("-c", IMPORTS, path=CHECKOUT, folder=CHECKOUT).splitlines()
    assert Path(place).resolve() == CHECKOUT / "kernels" / "relation_kl" / "__init__.py"
    assert any(line.startswith("  --parallel.tp") for line in printed)


def test_there_is_no_top_level_kernels_package():
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()
