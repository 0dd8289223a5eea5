"""Reading a configuration: a YAML file, overrides, old spellings, and bad keys and values."""

from __future__ import annotations

import pytest

from megalard.config.file import in_present_spelling, load_config, present_spelling, recorded_config
from megalard.config.schema import Config, to_dict
from tests.command_line import user_error
from tests.config.loading import REQUIRED, load, refusal


def test_defaults_hold_where_nothing_is_given():
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


def test_an_empty_section_has_its_defaults(write):
    config = load("--rope.factor", "2", path=write("rope:\noptimizer:\n"))
    assert config.rope.factor == 2 and config.optimizer == Config().optimizer


@pytest.mark.parametrize("null", ["null", "~"])
def test_null_removes_a_key_of_the_file(null, write):
    path = write("optimizer: {steps: 7, clip: 1}\nobjective: {layers: [0], logits_kl: 2}\n")
    config = load(f"--optimizer.steps={null}", f"--objective.layers={null}", path=path)
    assert config.optimizer.steps == 144 and config.optimizer.clip == 1
    assert config.objective.layers is None and config.objective.logits_kl == 2
    assert load(f"--optimizer={null}", path=path).optimizer == Config().optimizer


def test_null_removes_a_text_that_may_be_left_out(write):
    path = write("model: {student: s, tokenizer: k}\n")
    config = load("--model.tokenizer", "null", path=path)
    assert config.model.tokenizer is None and config.model.student == "s"
    # A required text cannot be removed: the word is the name of a directory.
    assert load("--model.teacher", "null", path=path).model.teacher == "null"


def test_null_removes_a_stream_of_the_file(write):
    path = write(
        "streams: {a: {objective: {logits_kl: 1}}, b: {objective: {language_modelling: 1}}}"
    )
    assert list(load(path=path).streams) == ["a", "b"]
    assert list(load("--streams.b=null", path=path).streams) == ["a"]
    # Without any stream the sections objective and data describe the one stream.
    both = load("--streams.a=null", "--streams.b=null", path=path)
    assert both.streams == {} and list(both.all_streams()) == ["main"]
    assert load("--streams=null", path=path).streams == {}


@pytest.mark.parametrize("group", ["streams", "stages"])
def test_a_name_that_yaml_reads_as_a_number_is_the_same_entry_for_an_override(group, write):
    path = write(f"{group}: {{1: {{objective: {{logits_kl: 1}}}}}}")
    for entry in (
        f"{group}.1.data.packing=false",
        f"{group}={{1: {{objective: {{logits_kl: 1}}}}}}",
    ):
        entries = getattr(load(f"--{entry}", path=path), group)
        assert list(entries) == ["1"] and entries["1"].objective.logits_kl == 1
    entries = getattr(load(f"--{group}.1.data.packing=false", path=path), group)
    assert not entries["1"].data.packing


@pytest.mark.parametrize("text", ["2e-5", "2.0e-5", "0.00002", "2E-05"])
def test_small_floats_are_read_in_every_spelling(text, write):
    assert load("--optimizer.learning_rate", text).optimizer.learning_rate == 2e-5
    path = write(f"optimizer: {{learning_rate: {text}}}")
    assert load(path=path).optimizer.learning_rate == 2e-5


def test_values_of_every_kind_are_read():
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


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("optimiser.steps", "optimizer"),
        ("trainable.lora.ranks", "trainable.lora.rank"),
        ("learning_rate", "optimizer.learning_rate"),
        ("data.tp", "parallel.tp"),
        ("lr", "optimizer.learning_rate"),
        ("run.zzz", "run."),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key, nearest):
    unknown = key if key != "optimiser.steps" else "optimiser"
    sentence = refusal(f"--{key}", "1")
    assert f"unknown key '{unknown}'; the nearest known one is '{nearest}" in sentence


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
        (["--run.seed"], "--run.seed needs a value: only --preflight, --version and --help"),
    ],
)
def test_wrong_types_and_forms_are_refused(overrides, sentence):
    assert sentence in refusal(*overrides)


@pytest.mark.parametrize("key", ["model.teacher", "data.paths", "run.output"])
def test_a_required_key_that_is_missing_is_named(key):
    position = REQUIRED.index(f"--{key}")
    rest = REQUIRED[:position] + REQUIRED[position + 2 :]
    assert f"{key} is not set: give " in user_error(load_config, None, rest)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("model: 3\n", "'model' is a section, got the value 3"),
        ("optimizer: [3]\n", "'optimizer' is a section, got the value [3]"),
        ("1: 2\n", "unknown key '1'"),
    ],
)
def test_a_file_with_wrong_sections_is_refused(content, sentence, write):
    assert sentence in user_error(load_config, write(content), [])


def test_the_old_spelling_of_a_key_is_read_with_one_warning(write, capsys):
    config = load("--objective.attention_context", "0.5")
    assert config.objective.attention_output == 0.5
    assert capsys.readouterr().err == (
        "warning: objective.attention_context is now called objective.attention_output\n"
    )
    path = write("streams: {a: {objective: {attention_context: 2}}}\n")
    assert load(path=path).streams["a"].objective.attention_output == 2
    assert capsys.readouterr().err == (
        "warning: streams.a.objective.attention_context is now called "
        "streams.a.objective.attention_output\n"
    )
    load("--objective.attention_output", "0.5")
    assert capsys.readouterr().err == ""


def test_only_the_key_of_that_section_has_an_old_spelling():
    assert present_spelling("streams.x.objective.attention_context") == (
        "streams.x.objective.attention_output"
    )
    assert present_spelling("data.attention_context") == "data.attention_context"
    assert "unknown key 'data.attention_context'" in refusal("--data.attention_context", "1")
    tree = {"objective": {"attention_context": 1, "layers": [0]}, "run": {"seed": 2}}
    assert in_present_spelling(tree) == {
        "objective": {"attention_output": 1, "layers": [0]},
        "run": {"seed": 2},
    }
    assert tree["objective"]["attention_context"] == 1, "the tree itself is unchanged"


def test_a_recorded_configuration_may_have_old_spellings_and_lack_newer_keys():
    """A run of an earlier version wrote the configuration, as JSON."""
    recorded = recorded_config(
        {
            "objective": {"attention_context": 2.0},
            "stages": {"a": {}, "b": {"objective": {"attention_context": 3.0}}},
            "optimizer": {"steps": 5},
        }
    )
    first, second = recorded.all_stages().values()
    assert [stage.objective.attention_output for stage in (first, second)] == [2.0, 3.0]
    assert (recorded.steps, recorded.optimizer.betas) == (10, [0.9, 0.95])


def test_control_characters_are_escaped_in_messages():
    sentence = refusal("--optimizer.\x1b[31mred", "1")
    assert "\\x1b[31mred" in sentence and sentence.isprintable()
    sentence = refusal("--run.output", "a\x1b[2Jb")
    assert sentence.startswith("run.output has a control character or a byte that is not UTF-8")
    assert "\\x1b[2J" in sentence and sentence.isprintable()
    assert "not UTF-8" in refusal("--data.text_key", "a\udcffb")


def test_long_values_are_shortened_in_messages():
    assert len(refusal("--optimizer.steps", "x" * 10**6)) < 300
    assert len(refusal("--optimizer.steps", "9" * 4000)) < 300
    assert len(refusal(f"--{'k' * 10**5}", "1")) < 400


def test_words_after_a_key_are_a_list():
    config = load("--evaluation.lengths", "192", "768", "--objective.layers", "0", "3")
    assert config.evaluation.lengths == [192, 768] and config.objective.layers == [0, 3]
    assert load("--data.paths", "a b", "c").data.paths == ["a b", "c"]
    # Only where the key holds a list, and the value is a word of its own.
    assert "expected --section.key value, got '4'" in refusal("--run.seed", "3", "4")
    assert "expected --section.key value, got '4'" in refusal("--objective.layers=3", "4")
    assert "expected --section.key value, got '4'" in refusal("--run.seed=3", "4")


@pytest.mark.parametrize("lengths", [("[4K, 2k, 7]",), ("4K", "2K", "7")])
def test_numbers_of_tokens_have_a_unit(lengths, write):
    config = load("--evaluation.lengths", *lengths, "--data.context_length=8k")
    assert config.evaluation.lengths == [4096, 2048, 7] and config.data.context_length == 8192
    evaluation = load(path=write("evaluation: {max_tokens: 64K, validation_tokens: 8K}")).evaluation
    assert (evaluation.max_tokens, evaluation.validation_tokens) == (65536, 8192)
    # Other numbers have none.
    assert "optimizer.steps must be of type int, got '2K'" in refusal("--optimizer.steps=2K")
    assert "data.context_length must be of type int" in refusal("--data.context_length=4.5K")
