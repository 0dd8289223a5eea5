"""The settings: defaults and several streams."""

from __future__ import annotations

import pytest

from megalard.config.schema import Config, to_dict
from tests.config.loading import load, refusal


def test_checkpoints_are_saved_by_default():
    """Otherwise a crash would lose the whole run."""
    checkpoint = Config().checkpoint
    assert (checkpoint.save_every, checkpoint.keep_last) == (50, 2)
    assert checkpoint.asynchronous and checkpoint.keep_every == checkpoint.export_every == 0


def test_what_is_trained_by_default_stays_what_it_was():
    """A configuration that leaves these out must not train another model in a later version."""
    default = to_dict(Config())
    assert default["trainable"] == {
        "mode": "lora",
        "lora": {"targets": ["q", "k", "v"], "rank": 1024, "alpha": 2048.0, "dropout": 0.05},
        "weights": ["q", "k", "v"],
    }
    assert default["optimizer"] == {
        "steps": 144,
        "learning_rate": 2e-5,
        "warmup_steps": 4,
        "start_at_zero": False,
        "min_ratio": 0.9,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip": 5.0,
        "global_batch": 8,
        "micro_batch": 1,
    }
    assert default["rope"] == {
        "type": "linear",
        "factor": 8.0,
        "theta": None,
        "long_factors": None,
        "table": None,
    }
    assert default["data"] == {
        "paths": [],
        "weights": None,
        "text_key": "text",
        "format": "text",
        "context_length": 4096,
        "positions": "contiguous",
        "bos": "auto",
        "eos": "auto",
        "end_token": None,
        "packing": True,
        "drop_tails": False,
        "cache": None,
    }
    relations = {"q": 1.0, "k": 1.0, "v": 1.0, "qk": 0.0}
    objective = {"layers": None, "hidden_depths": [1.0], "logits_positions": None}
    terms = ("attention_output", "hidden_cosine", "logits_kl", "language_modelling")
    assert default["objective"].items() >= objective.items()
    assert default["objective"]["relations"] == relations
    assert [default["objective"][term] for term in terms] == [0.0] * 4
    assert default["model"]["compute_dtype"] == "bfloat16"
    assert default["parallel"]["gradient_dtype"] == "float32"
    assert (default["run"]["seed"], default["run"]["non_finite"]) == (0, "stop")


def test_a_configuration_is_plain_dictionaries():
    tree = to_dict(load("--streams={a: {objective: {logits_kl: 1}}}"))
    assert tree["streams"]["a"]["objective"]["logits_kl"] == 1
    assert tree["model"]["compute_dtype"] == "bfloat16"


CPT = "{long: {objective: {language_modelling: 1}}}"
WITH_SIZES = CPT.replace("1}}", "1}, data: {context_length: 8}, global_batch: 4}")


def test_without_streams_there_is_one():
    config = load("--optimizer.global_batch=6", "--data.context_length=100")
    (name, stream), *others = config.all_streams().items()
    assert (name, others) == ("main", [])
    assert (stream.objective, stream.data) == (config.objective, config.data)
    assert (stream.weight, stream.global_batch, stream.micro_batch) == (1.0, 6, 1)
    assert config.tokens_per_step == 600


def test_a_stream_takes_what_it_leaves_out_from_the_sections():
    config = load(
        "--data.paths=[a]",
        "--optimizer.global_batch=6",
        "--data.packing=false",
        "--streams={1: {objective: {logits_kl: 1}, data: {paths: [b], context_length: 10}}, "
        "b: {objective: {relations: {qk: 2}}, global_batch: 3, data: }}",
        "--streams.b.data.cache=007",
    )
    a, b = config.streams.values()
    assert a.data.paths == ["b"] and b.data.paths == ["a"]
    assert not a.data.packing and not b.data.packing
    assert b.data.cache == "007"
    assert (a.global_batch, b.global_batch) == (6, 3)
    # The objective of a stream has only the terms that it names.
    assert a.objective.active_relations() == {} and a.objective.logits_kl == 1
    assert b.objective.active_relations() == {"qk": 2.0}
    assert config.tokens_per_step == 6 * 10 + 3 * 4096
    assert list(config.streams) == ["1", "b"]


def test_an_empty_section_of_streams_is_no_streams(write):
    assert list(load(path=write("streams:\n")).all_streams()) == ["main"]


def test_the_seed_of_a_stream_does_not_depend_on_the_other_streams():
    terms = "objective: {logits_kl: 1}"
    both = load(f"--streams={{a: {{{terms}}}, b: {{{terms}}}}}", "--run.seed=5")
    turned = load(f"--streams={{b: {{{terms}}}, a: {{{terms}}}}}", "--run.seed=5")
    # The CRC-32 of the names: a resumed run and all ranks must draw the same.
    for config in (both, turned):
        assert config.stream_seed("a") == 5 + 3904355907
        assert config.stream_seed("b") == 5 + 1908338681
    assert load("--run.seed=5").stream_seed("main") == 5


@pytest.mark.parametrize(
    ("streams", "sentence"),
    [
        ("3", "'streams' is a section of named entries, got the value 3"),
        ("{a: 3}", "'streams.a' is a section, got the value 3"),
        ("{a: }", "streams.a.objective is empty"),
        ("{a: {objective: {logits_kl: 1}, data: 3}}", "'streams.a.data' is a section"),
        ("{'': {objective: {logits_kl: 1}}}", "streams has the entry '': a name may have letters"),
        ("{a: {objective: {}}}", "streams.a.objective is empty"),
        (
            "{a: {objective: {logits_kl: -1}}}",
            "streams.a.objective.logits_kl must be at least 0; got -1.0",
        ),
        ("{a: {objectives: {}}}", "unknown key 'streams.a.objectives'; the nearest known one is"),
        ("{a.b: {objective: {logits_kl: 1}}}", "streams has the entry 'a.b': a name may have"),
        (
            "{a: {objective: {logits_kl: 1}, weight: 0}}",
            "streams.a.weight must be greater than 0; got 0.0",
        ),
        (
            "{a: {objective: {logits_kl: 1}, micro_batch: 0}}",
            "streams.a.micro_batch must be at least 1; got 0",
        ),
        (
            "{a: {objective: {logits_kl: 1}, data: {positions: skip}}}",
            "streams.a.data.positions must be one of contiguous, skip-gaussian, skip-uniform",
        ),
        (
            "{a: {objective: {hidden_cosine: 1, hidden_depths: [0, 1]}}}",
            "streams.a.objective.hidden_depths must be greater than 0; got [0.0, 1.0]",
        ),
    ],
)
def test_bad_streams_are_refused_in_one_sentence(streams, sentence):
    assert sentence in refusal(f"--streams={streams}")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objective.logits_kl=1", "objective and streams are both given: give each stream its"),
        ("data.context_length=8", "set streams.NAME.data.context_length instead"),
        ("optimizer.global_batch=8", "set streams.NAME.global_batch instead"),
    ],
)
def test_a_setting_that_no_stream_takes_is_refused(override, sentence):
    assert sentence in refusal(f"--streams={WITH_SIZES}", f"--{override}")


def test_a_shared_value_of_a_recipe_may_lose_its_last_user_to_an_override(write):
    """Only the override could be meant otherwise."""
    path = write(f"data: {{context_length: 16}}\nstreams: {CPT}\n")
    config = load("--streams.long.data.context_length=8", path=path)
    assert config.streams["long"].data.context_length == 8
    both = f"data: {{context_length: 16}}\nstreams: {WITH_SIZES}\n"
    assert "data.context_length is given, but every stream gives its own" in refusal(
        path=write(both)
    )
