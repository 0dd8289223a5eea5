"""The recipes: each can be loaded by its name, and the published ones have the published values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml

from megalard.config.recipes import find_config, recipes, title
from megalard.config.schema import Config, to_dict
from tests.command_line import user_error
from tests.config.loading import load

LAUNCH = Path(__file__).parents[2] / "launch" / "configs"
# Every file, with the recipes of the study, which are given by their path.
FILES = sorted(LAUNCH.rglob("*.yaml"))
PUBLISHED = {
    "linearard-llama2-7b-x8": (8.0, "yes", {"q": 1.0, "k": 1.0, "v": 1.0}),
    "linearard-llama3-8b-x4": (4.0, "no", {"q": 1.0, "k": 0.25, "v": 0.25}),
    "linearard-mistral-7b-x4": (4.0, "yes", {"q": 1.0, "k": 0.25, "v": 0.25}),
}


def load_recipe(path: Path | str) -> Config:
    """Load a recipe, with what it leaves to the user."""
    # A recipe that keeps the student's RoPE needs to know where the student is.
    return load("--model.student", "s", path=str(path))


def leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the path and the value of everything in a tree that is not a section."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def as_number(value: object) -> object:
    """Return what YAML 1.1 reads as text, 2e-5 or 4K, as a number; lists item by item."""
    if isinstance(value, list):
        return [as_number(x) for x in value]
    if isinstance(value, str) and re.fullmatch(r"[\d.]+(e-?\d+)?K?", value):
        return float(value.removesuffix("K")) * (1024 if value.endswith("K") else 1)
    return value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_has_the_values_of_its_file(path):
    config, given = load_recipe(path), yaml.safe_load(path.read_text())
    for keys, value in leaves(given):
        if keys in (("model", "teacher"), ("model", "student"), ("data", "paths")):
            continue  # what ``load`` gives in their place
        # YAML reads these two words as booleans.
        words = {True: "yes", False: "no"} if keys[-1] in ("bos", "eos") else {}
        expected = words.get(value, value) if words else as_number(value)
        assert reduce(getitem, keys, to_dict(config)) == expected, ".".join(keys)
    stages = given.get("stages") or {"main": given}
    assert [*config.all_stages()] == [*stages]
    for name, stage in config.all_stages().items():
        optimizer = {**given.get("optimizer", {}), **stages[name].get("optimizer", {})}
        assert {"warmup_steps", "clip"} & optimizer.keys()
        for key, value in optimizer.items():
            read = getattr(stage.optimizer, key)
            assert read == ([float(x) for x in value] if key == "betas" else float(value))


def test_recipes_are_found_by_name(tmp_path, monkeypatch):
    names = {path.stem for path in LAUNCH.glob("*.yaml")}
    assert set(recipes()) == names and len(names) > 10
    for name in names:
        assert Path(find_config(name)).read_bytes() == (LAUNCH / f"{name}.yaml").read_bytes()
    assert load_recipe("linearard-llama2-7b-x8").rope.factor == 8
    assert find_config("/nothing/of-that-name") == "/nothing/of-that-name"
    # A file of the user goes before a recipe of the same name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("rope: {factor: 3}\n")
    assert find_config("quickstart") == "quickstart"
    assert load_recipe("quickstart").rope.factor == 3


def test_a_misspelled_recipe_is_refused_with_the_nearest_one():
    assert user_error(find_config, "qickstart") == (
        "--config 'qickstart' is neither a file nor a recipe: give a file, or a recipe that "
        "`megalard train --help` lists, such as quickstart"
    )


def test_a_title_is_the_first_sentence_of_the_comment(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("# A title over\n# two lines. And more.\nrope: {factor: 8}\n# later\n")
    assert title(path) == "A title over two lines"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipes_have_the_published_values(name):
    """arXiv 2604.00004 and the authors' script and train.py, commit 23866f6."""
    factor, bos, relations = PUBLISHED[name]
    config = load_recipe(name)
    assert (config.rope.type, config.rope.factor) == ("linear", factor)
    stages = config.all_stages()
    assert [*stages] == ["ard", "long"]
    ard = stages["ard"]
    lora, optimizer, data = ard.trainable.lora, ard.optimizer, ard.data
    assert (ard.trainable.mode, lora.targets, lora.rank) == ("lora", ["q", "k", "v"], 1024)
    assert (lora.alpha, lora.dropout) == (2048, 0.05)
    assert ard.objective.active_terms() == ["relations"]
    assert ard.objective.active_relations() == relations
    assert (data.context_length, data.packing, data.drop_tails) == (4096, False, True)
    assert (data.bos, data.eos) == (bos, "no")
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.steps) == (2e-5, 4, 144)
    assert optimizer.start_at_zero and (optimizer.min_ratio, optimizer.clip) == (0.9, 5)
    # The defaults of torch.optim.AdamW.
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ([0.9, 0.999], 1e-8, 0.01)
    assert optimizer.global_batch == 4
    # 4.25M tokens together.
    assert config.tokens == 144 * 4 * 4096 + 29 * 2 * 32768
    assert abs(config.tokens - 4.25e6) < 0.02e6
    assert stages["long"].trainable.mode == "all"
    assert stages["long"].objective.active_terms() == ["language_modelling"]


@pytest.mark.parametrize(
    ("name", "factor"), [("llama2-7b-x8", 8), ("llama3-8b-x4", 4), ("mistral-7b-x8", 8)]
)
def test_our_recipes_have_the_published_rates(name, factor):
    config = load_recipe(name)
    lora, optimizer = config.trainable.lora, config.optimizer
    assert config.rope.type == "linear" and config.rope.factor == factor
    assert config.data.context_length == 4096
    assert (lora.targets, lora.rank) == (["q", "k", "v"], 1024)
    assert (lora.alpha, lora.dropout) == (2048, 0.05)
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (2e-5, 4)
    assert (optimizer.min_ratio, optimizer.clip, optimizer.steps) == (0.9, 5, 144)


def test_only_one_recipe_names_a_window():
    """The native window is read from the model; Qwen3's config.json has room for the answer."""
    named = {
        path.stem: window
        for path in FILES
        if (window := (yaml.safe_load(path.read_text()).get("model") or {}).get("native_context"))
    }
    assert named == {"qwen3-8b-yarn-x4": 32768}
