"""The order of the folders: imports only go down, modules form no cycle, and files stay short."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

from tests.processes import CHECKOUT

# The folders and single files of the package, each above all that it may import. A subfolder
# belongs to its folder. Scripts in tools/ use the package, and the package uses none of them.
ORDER = (
    "megalard",  # megalard/__init__.py: the version
    "megalard.errors",
    "megalard.error_file",
    "megalard.parents",
    "megalard.quiet",
    "megalard.reporter",
    "megalard.gpu",
    "megalard.transfer",
    "megalard.hashing",
    "megalard.kernels",
    "megalard.files",
    "megalard.config",
    "megalard.model",
    "megalard.parallel",
    "megalard.progress",
    "megalard.data",
    "megalard.checkpoint",
    "megalard.distill",
    "megalard.estimate",
    "megalard.evaluation",
    "megalard.report",
    "megalard.training",
    "megalard.cli",
    "megalard.train",
    "megalard.commands",
    "megalard.__main__",
    "megalard.launcher",
    "tools",
    "tools.quickstart",
    "tools.study",
    "tools.bench",
    "tools.campaigns",
    "tools.mutation",
)
LONGEST_FILE_LINES = 400

CODE = ("*.py", "*.sh", "*.sbatch")


def modules(root: Path) -> dict[str, Path]:
    """Return the modules of the package, of its kernels and of the tools, by dotted name."""
    files = {}
    for folder in ("megalard", "kernels", "tools"):
        for file in (root / folder).rglob("*.py"):
            name = ".".join(file.relative_to(root).with_suffix("").parts)
            # The package has the kernels through a link, which not every rglob follows.
            if not name.startswith("megalard.kernels.relation_kl"):
                name = name.removesuffix(".__init__")
                files[f"megalard.{name}" if folder == "kernels" else name] = file
    return files


def imports(name: str, file: Path, names: set[str]) -> set[str]:
    """Return the modules among ``names`` that a module imports, also inside its functions."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(start if node.level else []), *([node.module] * bool(node.module))])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            while target and target not in names:
                target = target.rpartition(".")[0]
            imported |= {target} - {"", name}
    return imported


def import_graph(root: Path) -> dict[str, set[str]]:
    files = modules(root)
    return {name: imports(name, file, set(files)) for name, file in files.items()}


def place(name: str) -> str:
    """Return the entry of ``ORDER`` that a module belongs to: its longest prefix, or itself."""
    exact = [entry for entry in ORDER if name == entry]
    inside = [entry for entry in ORDER[1:] if name.startswith(f"{entry}.")]
    entries = sorted([*exact, *inside], key=len)
    assert entries, f"{name} has no place in ORDER: add its folder below all that imports it"
    return entries[-1]


def upward_imports(entry: str, graph: dict[str, set[str]]) -> list[str]:
    """Return the imports by which an entry of ``ORDER`` uses one that is above it."""
    height = {entry: number for number, entry in enumerate(ORDER)}
    return sorted(
        f"{name} imports {target}"
        for name, targets in graph.items()
        if place(name) == entry
        for target in targets
        if height[place(target)] > height[entry]
    )


@pytest.fixture(scope="module")
def graph():
    return import_graph(CHECKOUT)


@pytest.mark.parametrize("entry", ORDER)
def test_imports_only_go_down(entry, graph):
    assert entry in {place(name) for name in graph}, f"ORDER names {entry}, which does not exist"
    assert upward_imports(entry, graph) == []


def test_no_modules_import_each_other_in_a_circle(graph):
    graphlib.TopologicalSorter(graph).prepare()


def test_the_decoder_calls_no_collectives(graph):
    """Whatever communicates is handed in as ``ops``."""
    for name, file in modules(CHECKOUT).items():
        if place(name) == "megalard.model":
            assert "torch.distributed" not in file.read_text(encoding="utf-8"), name


def test_no_file_of_code_is_long():
    long = {}
    for folder in ("megalard", "kernels", "tools", "tests", "launch"):
        for pattern in CODE:
            for file in (CHECKOUT / folder).rglob(pattern):
                path = file.relative_to(CHECKOUT)
                if not any(part.startswith(".") for part in path.parts):
                    lines = len(file.read_text(encoding="utf-8").splitlines())
                    if lines > LONGEST_FILE_LINES:
                        long[str(path)] = lines
    assert not long, f"split these files, by what they do: {long}"


@pytest.mark.parametrize(
    "line",
    [
        "import megalard.training.step",
        "from megalard.training import step",
        "from megalard.training.step import run",
        "from ..training import step",
        "def f():\n    from megalard.training.step import run",
    ],
)
def test_an_upward_import_is_seen(tmp_path, line):
    write(tmp_path / "megalard/training/step.py", "")
    write(tmp_path / "megalard/model/decoder.py", line)
    expected = ["megalard.model.decoder imports megalard.training.step"]
    assert upward_imports("megalard.model", import_graph(tmp_path)) == expected


def test_a_circle_of_imports_is_seen(tmp_path):
    write(tmp_path / "megalard/model/decoder.py", "from megalard.model import layers")
    write(tmp_path / "megalard/model/layers.py", "from .decoder import Decoder")
    with pytest.raises(graphlib.CycleError):
        test_no_modules_import_each_other_in_a_circle(import_graph(tmp_path))


def test_a_folder_without_a_place_is_seen(tmp_path):
    write(tmp_path / "megalard/extras/more.py", "")
    with pytest.raises(AssertionError, match=r"megalard\.extras has no place in ORDER"):
        upward_imports("megalard.model", import_graph(tmp_path))


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.parent / "__init__.py").touch()
    file.write_text(text)
