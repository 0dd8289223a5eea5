"""The configuration: a YAML file, overrides, and bad values told in one sentence each."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from megalard.config.file import describe_keys, load_config
from megalard.config.schema import Config, to_dict
from megalard.errors import UserError
from megalard.train import main

RECIPES = sorted((Path(__file__).parents[1] / "launch" / "configs").rglob("*.yaml"))
NEEDED = ["--model.teacher", "t", "--data.paths", "[a, b]", "--run.output", "out"]


def load(*overrides: str, path: str | None = None) -> Config:
    return load_config(path, [*NEEDED, *overrides])


def refusal(*overrides: str, path: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides, path=path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file and gives its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_defaults_are_kept_where_nothing_is_said():
    expected = to_dict(Config())
    expected["model"]["teacher"] = "t"
    expected["data"]["paths"] = ["a", "b"]
    expected["run"]["output"] = "out"
    assert to_dict(load()) == expected


def test_overrides_win_over_the_file(write):
    path = write("optimizer:\n  steps: 7\n  clip: 1\nrope: {type: yarn}\n")
    config = load("--optimizer.steps", "9", "--rope.factor=4", path=path)
    assert (config.optimizer.steps, config.optimizer.clip) == (9, 1.0)
    assert (config.rope.type, config.rope.factor) == ("yarn", 4.0)


def test_the_last_of_two_overrides_wins():
    assert load("--run.seed", "1", "--run.seed", "2").run.seed == 2


def test_an_empty_section_is_a_section(write):
    config = load("--rope.factor", "2", path=write("rope:\noptimizer:\n"))
    assert config.rope.factor == 2 and config.optimizer == Config().optimizer


@pytest.mark.parametrize("text", ["2e-5", "2.0e-5", "0.00002", "2E-05"])
def test_small_floats_in_every_spelling(text, write):
    assert load("--optimizer.learning_rate", text).optimizer.learning_rate == 2e-5
    path = write(f"optimizer: {{learning_rate: {text}}}")
    assert load(path=path).optimizer.learning_rate == 2e-5


def test_values_of_every_kind():
    config = load(
        *("--objective.layers", "[0, 3]", "--trainable.lora.targets", "q"),
        *("--data.packing", "false", "--optimizer.betas", "[0.8, 1e-2]"),
        *("--trainable.lora.alpha", "3", "--model.native_context", "64"),
    )
    assert config.objective.layers == [0, 3]
    assert config.trainable.lora.targets == ["q"]
    assert config.data.packing is False
    assert config.optimizer.betas == [0.8, 0.01]
    assert isinstance(config.trainable.lora.alpha, float)
    assert config.model.native_context == 64
    for key in ("native_context", "tokenizer"):
        assert getattr(load(f"--model.{key}", "null").model, key) is None


@pytest.mark.parametrize("name", ["2026-01-05", "7", "a: b", "no", "1e3"])
def test_paths_are_taken_as_typed(name):
    assert load("--run.output", name).run.output == name
    assert load(f"--model.teacher={name}").model.teacher == name
    assert load("--data.cache", name).data.cache == name


def test_only_weighted_relations_are_active():
    config = load("--objective.relations.k", "0", "--objective.relations.qk", "0.5")
    assert config.objective.active_relations() == {"q": 1.0, "v": 1.0, "qk": 0.5}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("optimiser.steps", "optimizer"),
        ("trainable.lora.ranks", "trainable.lora.rank"),
        ("learning_rate", "optimizer.learning_rate"),
        ("data.tp", "parallel.tp"),
        ("run.zzz", "run."),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key, nearest):
    known = key if key != "optimiser.steps" else "optimiser"
    assert f"unknown key '{known}'; the nearest known one is '{nearest}" in refusal(f"--{key}", "1")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["--optimizer.steps", "many"], "optimizer.steps must be of type int, got 'many'"),
        (["--optimizer.steps", "1.5"], "optimizer.steps must be of type int, got 1.5"),
        (["--optimizer.steps", "true"], "optimizer.steps must be of type int, got True"),
        (["--optimizer.clip", "large"], "optimizer.clip must be of type float, got 'large'"),
        (["--data.packing", "1"], "data.packing must be of type bool, got 1"),
        (["--objective.layers", "[a]"], "objective.layers must be of type int, got 'a'"),
        (["--optimizer", "3"], "'optimizer' is a section, got the value 3"),
        (["--run.seed", "1", "--run.seed.x", "3"], "'seed' is a value, not a section"),
        (["steps", "3"], "expected --section.key value, got 'steps'"),
        (["--run.seed"], "--run.seed needs a value: only --preflight and --help"),
    ],
)
def test_wrong_types_and_forms_are_refused(overrides, sentence):
    assert sentence in refusal(*overrides)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.compute_dtype", "float16"),
        ("model.native_context", "0"),
        ("rope.type", "ntk"),
        ("rope.factor", "1"),
        ("rope.factor", "nan"),
        ("rope.factor", ".inf"),
        ("trainable.mode", "none"),
        ("trainable.weights", "[]"),
        ("trainable.weights", "[q, q]"),
        ("trainable.lora.targets", "[q, x]"),
        ("trainable.lora.rank", "0"),
        ("trainable.lora.dropout", "1"),
        ("objective.relations.q", "-1"),
        ("objective.logits_kl", "-1"),
        ("objective.layers", "[]"),
        ("objective.layers", "[1, 1]"),
        ("objective.layers", "[-1]"),
        ("objective.logits_positions", "0"),
        ("data.context_length", "1"),
        ("optimizer.steps", "0"),
        ("optimizer.global_batch", "0"),
        ("optimizer.micro_batch", "-3"),
        ("optimizer.warmup_steps", "-1"),
        ("optimizer.weight_decay", "-0.1"),
        ("optimizer.clip", "-1"),
        ("optimizer.eps", "-1"),
        ("optimizer.learning_rate", "0"),
        ("optimizer.learning_rate", "nan"),
        ("optimizer.learning_rate", "inf"),
        ("optimizer.min_ratio", "1.5"),
        ("optimizer.betas", "[0.9]"),
        ("optimizer.betas", "[0.9, 1.0]"),
        ("parallel.tp", "0"),
        ("evaluation.lengths", "[]"),
        ("evaluation.lengths", "[1]"),
        ("evaluation.max_tokens", "1"),
        ("run.device", "tpu"),
        ("run.non_finite", "ignore"),
        ("run.log_every", "0"),
        ("checkpoint.save_every", "-1"),
        ("checkpoint.export_every", "-1"),
    ],
)
def test_values_out_of_range_are_refused_by_key(key, value):
    assert key in refusal(f"--{key}", value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["--rope.type", "dynamic"], "'dynamic' equals the teacher's RoPE at up to M tokens"),
        (["--rope.theta", "5e5"], "rope.theta only applies to rope.type abf"),
        (["--rope.type", "abf", "--rope.theta", "0"], "rope.theta must be positive"),
        (["--rope.long_factors", "[1]"], "rope.long_factors only applies to rope.type longrope"),
        (["--rope.table", "x"], "rope.table only applies to rope.type table"),
        (["--rope.type", "table"], "rope.type table needs rope.table FILE"),
        (["--rope.type", "checkpoint"], "rope.type checkpoint needs model.student"),
        (
            [f"--objective.relations.{name}=0" for name in "qkv"],
            "the objective is empty",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides, sentence):
    assert sentence in refusal(*overrides)


@pytest.mark.parametrize("key", ["model.teacher", "data.paths", "run.output"])
def test_what_a_run_cannot_do_without_is_asked_for(key):
    position = NEEDED.index(f"--{key}")
    rest = NEEDED[:position] + NEEDED[position + 2 :]
    with pytest.raises(UserError, match=f"{key} is not set"):
        load_config(None, rest)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("model: [", "is not valid YAML"),
        ("optimizer: {steps: 3}\noptimizer: {eps: 1}", "'optimizer' is given twice"),
        ("optimizer: {steps: 3, steps: 4}", "'steps' is given twice"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        ("- a\n- b\n", "must hold sections such as 'model:' and 'data:'"),
        ("model: 3\n", "'model' is a section, got the value 3"),
        ("1: 2\n", "unknown key '1'"),
    ],
)
def test_a_bad_file_is_refused(content, sentence, write):
    path = write(content)
    with pytest.raises(UserError, match=sentence) as caught:
        load_config(path, [])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    sentence = refusal(path=str(tmp_path / "none.yaml"))
    assert sentence.endswith("none.yaml: No such file or directory")
    assert "cannot read the config file" in refusal(path=str(tmp_path))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(recipe):
    # one that keeps the student's own RoPE needs to be told where the student is
    config = load("--model.student", "s", path=str(recipe))
    given = yaml.safe_load(recipe.read_text())
    assert config.optimizer.learning_rate == float(given["optimizer"]["learning_rate"])


def test_the_authors_recipes_are_theirs():
    """arXiv 2604.00004: 4096 tokens, LoRA 1024/2048/0.05, and the schedule of every model."""
    factors = {"llama2-7b-x8": 8, "llama3-8b-x4": 4, "mistral-7b-x8": 8}
    assert factors.keys() <= {path.stem for path in RECIPES}
    for path in RECIPES:
        if path.stem not in factors:
            continue
        config = load(path=str(path))
        lora, optimizer = config.trainable.lora, config.optimizer
        assert config.rope.type == "linear" and config.rope.factor == factors[path.stem]
        assert config.data.context_length == 4096
        assert (lora.targets, lora.rank) == (["q", "k", "v"], 1024)
        assert (lora.alpha, lora.dropout) == (2048, 0.05)
        assert (optimizer.learning_rate, optimizer.warmup_steps) == (2e-5, 4)
        assert (optimizer.min_ratio, optimizer.clip, optimizer.steps) == (0.9, 5, 144)


def keys_of(cls, prefix: str = "") -> list[str]:
    found = []
    for item in dataclasses.fields(cls):
        factory = item.default_factory
        if dataclasses.is_dataclass(factory):
            found += keys_of(factory, f"{prefix}{item.name}.")
        else:
            found.append(prefix + item.name)
    return found


def test_help_lists_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert describe_keys() in text
    keys = keys_of(Config)
    assert len(keys) > 40
    for key in keys:
        assert f"  --{key}  (default: " in text
    assert "--preflight" in text and "--config FILE" in text
