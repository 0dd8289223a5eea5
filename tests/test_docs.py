"""README and docs/ are true: code runs, commands parse, links lead to files, maps are new."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import typing
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

from megalard import cli
from megalard.config.file import load_config
from megalard.config.schema import Config
from megalard.errors import UserError
from tests import pages
from tests.models import make_model
from tests.processes import CHECKOUT, finished
from tests.small_tokenizers import save_byte_tokenizer
from tests.students import StudentCase, make_config, make_student
from tools import code_map

BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]
# Placeholders for numbers, and what is parsed in their place.
NUMBERS = {"N": "4096", "B": "2"}
# Programs of others. lm_eval is parsed where tests/run.sh has installed it.
FOREIGN = {
    "git",
    "pip",
    "python3",
    "source",
    "zipfile",
    "pre-commit",
    "ruff",
    "sbatch",
    "vllm",
    "lm_eval",
    ".ci/run",
}
FOREIGN |= {".venv/bin/python"}
OURS = {"megalard", "python", "torchrun", "bash"}
FOLDERS = "launch|docs|megalard|kernels|tools|tests"
# Ends of names that are files, such as evaluation.json, and no settings.
FILES = {"py", "json", "png", "yaml", "safetensors"}
# Pages that are linked to and are not written yet.
NOT_YET_WRITTEN: set[str] = set()
# The first words of indented blocks that are no commands: formulas and listings of files.
LISTINGS = ("step-000050/", "chunks ")


def kind(block: pages.Block) -> str:
    """Return what a block is; every block must be one of four kinds."""
    if block.language != "indented":
        return block.language
    if block.text.startswith(LISTINGS):
        return "text"
    programs = {(pages.words(command) or [""])[0] for command in pages.commands(block)}
    if programs <= FOREIGN | OURS:
        return "console"
    if re.match(r"\w+ = ", block.text):
        return "python"
    return "yaml" if re.match(r"\w+:\n", block.text) else "unknown"


def of_kind(name: str) -> list[pages.Block]:
    return [block for block in BLOCKS if kind(block) == name]


COMMANDS = [(block, command) for block in of_kind("console") for command in pages.commands(block)]
# Commands in the text, which may leave out arguments.
SPANS = [
    (page, span)
    for page in pages.PAGES
    for span in pages.code_spans(page)
    if re.match(r"(megalard \w+|python -m tools\S*|bash \S+) ", span)
]


def test_every_block_has_a_kind():
    kinds = {str(block): kind(block) for block in BLOCKS}
    assert set(kinds.values()) <= {"python", "console", "yaml", "text"}, kinds
    assert len(of_kind("python")) >= 5 and len(COMMANDS) >= 40


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A directory with what the examples name: README.md, launch/, RUN/student, BASE, ADAPTER."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("README.md", "launch", "tests"):
        (folder / name).symlink_to(CHECKOUT / name)
    make_model("llama", folder / "BASE", vocab_size=257)
    save_byte_tokenizer(folder / "BASE")
    from megalard.parallel.mesh import build_mesh

    case = StudentCase("llama", "lora", "linear")
    made = make_student(make_config(case, folder / "BASE", folder / "none"), build_mesh("cpu", 1))
    made.save(folder / "RUN" / "student")
    write_adapter(folder)
    return folder


def write_adapter(folder: Path) -> None:
    """Write ``ADAPTER``: a PEFT adapter with the config.json of the student."""
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "BASE")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(base, lora).save_pretrained(folder / "ADAPTER")
    (folder / "ADAPTER/config.json").write_bytes((folder / "RUN/student/config.json").read_bytes())


@pytest.mark.parametrize("block", of_kind("python"), ids=str)
def test_python_code_runs(block, models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    names: dict = {"ADAPTER_DIR": "ADAPTER", "BASE_DIR": "BASE"}
    # Short examples leave out the imports of the libraries that their section is about.
    exec("from transformers import AutoConfig, AutoModelForCausalLM", names)
    exec("from peft import PeftModel", names)
    exec(compile(block.text, str(block), "exec"), names)
    if "config" in names:
        window = json.loads((models / "RUN/student/config.json").read_text())
        assert names["config"].max_position_embeddings == window["max_position_embeddings"] == 256
        assert names["model"].config.rope_parameters["factor"] == 4


@pytest.mark.parametrize("block", of_kind("yaml"), ids=str)
def test_settings_are_settings(block, tmp_path):
    required = {"model": {"teacher": "m"}, "data": {"paths": ["d"]}, "run": {"output": "o"}}
    settings = yaml.safe_load(block.text)
    for section, values in required.items():
        settings[section] = values | settings.get(section, {})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    load_config(str(tmp_path / "config.yaml"), [])


@pytest.mark.parametrize(
    ("block", "command"), COMMANDS, ids=[f"{b}-{c.split()[0]}" for b, c in COMMANDS]
)
def test_commands_are_understood(block, command, tmp_path, monkeypatch, capfd):
    words = [NUMBERS.get(word, word) for word in pages.words(command)]
    folders = ("a b", "DIR", "models/llama2-7b", "models/smollm2", "data/books", "heldout", "...")
    for name in (*folders, "text/train.jsonl"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "smollm2-x4.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert parse(words, monkeypatch) == 0, capfd.readouterr().err


@pytest.mark.parametrize(("page", "command"), SPANS, ids=[command for _, command in SPANS])
def test_flags_in_the_text_exist(page, command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    try:
        parse(pages.words(command), monkeypatch)
    except SystemExit as end:
        error = capfd.readouterr().err
        assert end.code == 0 or "required" in error or "expected one argument" in error, error


def parse(words: list[str], monkeypatch) -> int:
    """Give a command's words to the parser that takes them, and do nothing else."""
    program, rest = words[0], words[1:]
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(rest)
        return parse(
            ["python", "-m", options.training_script, *options.training_script_args], monkeypatch
        )
    if program == "megalard":
        return parse_megalard(rest, monkeypatch)
    if program == "bash":
        return parse_script(rest, monkeypatch)
    if program != "python":
        return 0
    if rest[0] == "-m":
        module, rest = rest[1], rest[2:]
    elif rest[0].split("/")[0].isupper():
        return 0  # a script of another program
    else:
        assert (CHECKOUT / rest[0]).is_file()
        module, rest = rest[0].removesuffix(".py").replace("/", "."), rest[1:]
    if module in FOREIGN:
        return 0
    if module == "megalard":
        return parse_megalard(rest, monkeypatch)
    # A tool parses its arguments, and then hands its work to ``cli.run``.
    monkeypatch.setattr(cli, "run", lambda work: 0)
    return importlib.import_module(module).main(rest)


def parse_megalard(words: list[str], monkeypatch) -> int:
    if words[0] not in cli.COMMANDS:
        return 1
    module = importlib.import_module(f"megalard.commands.{words[0]}")
    parsed: list[argparse.Namespace] = []
    monkeypatch.setattr(module, "run", parsed.append)
    status = cli.main(words)
    if getattr(module, "TAKES_OVERRIDES", False) and "FILE" not in words:
        load_config(parsed[0].config, parsed[0].rest, has_files=words[0] != "plan")
    return status


def parse_script(words: list[str], monkeypatch) -> int:
    """Run a start script with a Python that prints its arguments, and parse what it starts."""
    script = CHECKOUT / words[0]
    assert script.is_file()
    if words[0] != "launch/train.sh":
        return 0  # launch/quickstart.sh and tests/run.sh take no options of their own
    here = os.getcwd()
    given = [
        f"{here}{word}" if re.match("/(models|data|runs)/", word) else word for word in words[1:]
    ]
    python = Path(here, "python")
    python.write_text(PRINT_ARGUMENTS)
    python.chmod(0o755)
    done = finished(["bash", script, *given], env={"PYTHON": str(python)}, cwd=here)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return done.returncode
    started = done.stdout.splitlines()
    trainer = started.index("megalard.train")
    options = started[trainer + 1 :]
    recipe = options.index("--config") if "--config" in options else None
    name = None
    if recipe is not None:
        name = options[recipe + 1]
        del options[recipe : recipe + 2]
    load_config(name, [option for option in options if option != "--preflight"])
    return 0


# environment.sh asks a Python for its version and for the requirements, and train.sh for the GPUs.
PRINT_ARGUMENTS = """#!/bin/bash
case "$*" in
    *megalard.launcher*) printf '%s\\n' "$@" ;;
    *device_count*) echo 8 ;;
esac
"""


def test_an_unknown_flag_is_noticed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for command in (
        "megalard inspect RUN --brief",
        "megalard train --run.outptu x",
        "python -m tools.bench.step --token 5",
        "torchrun --nproc 2 -m tools.bench.step --micro 3",
        "bash launch/train.sh --modell x",
    ):
        try:
            status = parse(command.split(), monkeypatch)
        except (SystemExit, UserError):
            continue
        assert status != 0, command


@pytest.mark.skipif(
    not (CHECKOUT / "tests/.lm-eval").is_dir(), reason="needs lm-evaluation-harness (tests/run.sh)"
)
def test_commands_of_lm_eval_are_understood():
    given = [pages.words(c)[1:] for _, c in COMMANDS if pages.words(c)[0] == "lm_eval"]
    assert len(given) >= 4
    program = (
        "import json, sys\nfrom lm_eval._cli.harness import HarnessCLI\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['lm_eval', *words]\n    HarnessCLI().parse_args()\n"
    )
    path = f"{CHECKOUT / 'tests/.lm-eval'}{os.pathsep}{CHECKOUT}"
    done = finished([sys.executable, "-c", program, json.dumps(given)], env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in pages.headings(target)):
            broken.append(link)
    assert set(broken) <= NOT_YET_WRITTEN


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_files_and_settings_that_are_named_exist(page):
    keys, missing = setting_names(Config), []
    for span in pages.code_spans(page):
        if re.fullmatch(
            r"(launch|docs|megalard|kernels|tools|tests)/[\w/.-]+\.(py|sh|md|yaml)", span
        ):
            missing += [] if (CHECKOUT / span).exists() else [span]
        section, _, rest = span.partition(".")
        if section in keys and re.fullmatch(r"[a-z_.]+", rest) and rest not in FILES:
            missing += [] if span in keys else [span]
    assert set(missing) <= {"kernels/__init__.py"}, "the page says that this one does not exist"


def setting_names(cls: type, prefix: str = "") -> set[str]:
    names = set()
    for name, hint in typing.get_type_hints(cls).items():
        names.add(prefix + name)
        if is_dataclass(hint):
            names |= setting_names(typing.cast(type, hint), f"{prefix}{name}.")
    return names


@pytest.mark.parametrize("page", code_map.PAGES)
def test_the_map_of_the_code_is_new(page):
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    assert f"<!-- map: {code_map.PAGES[page]} -->" in text
    assert code_map.renewed(page) == text, "run python -m tools.code_map --write"
