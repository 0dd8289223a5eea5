"""Several kinds of text in one run, from the command line."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from megalard.config.file import load_config
from megalard.config.schema import Config
from megalard.errors import UserError
from megalard.parallel.mesh import build_mesh
from megalard.train import main
from megalard.training import assemble
from tests.jobs import CONTEXT, NATIVE, STEPS, arguments, make_job, metrics

CPT = "{long: {objective: {language_modelling: 1}}}"
# the job's own would be those of relations
CPT_SIZES = ["data.context_length=256", "optimizer.global_batch=2"]
OWN_SIZES = CPT.replace("1}}", "1}, data: {context_length: 8}, global_batch: 4}")
LONGRED = (
    "{long: {weight: 0.5, objective: {language_modelling: 1}, data: {context_length: 128}, "
    "global_batch: 2}, "
    "short: {weight: 1.875, objective: {hidden_cosine: 1, hidden_depths: [0.34, 1]}}, "
    "short-to-long: {weight: 1.25, objective: {hidden_cosine: 1}, "
    "data: {context_length: 64, positions: skip-gaussian}, global_batch: 2}}"
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("streams"))


def load(*overrides: str) -> Config:
    needed = ["--model.teacher=t", "--data.paths=[a]", "--run.output=out"]
    return load_config(None, [*needed, *overrides])


def test_without_streams_there_is_one():
    config = load("--optimizer.global_batch=6", "--data.context_length=100")
    (name, stream), *others = config.all_streams().items()
    assert (name, others) == ("main", [])
    assert (stream.objective, stream.data) == (config.objective, config.data)
    assert (stream.weight, stream.global_batch, stream.micro_batch) == (1.0, 6, 1)
    assert config.tokens_per_step == 600


def test_a_stream_takes_what_it_leaves_out_from_the_sections():
    config = load(
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
    # an objective has the terms it names
    assert a.objective.active_relations() == {} and a.objective.logits_kl == 1
    assert b.objective.active_relations() == {"qk": 2.0}
    assert config.tokens_per_step == 6 * 10 + 3 * 4096
    assert list(config.streams) == ["1", "b"]


def test_no_streams_are_none(tmp_path):
    (tmp_path / "null.yaml").write_text("streams:\n")
    needed = ["--model.teacher=t", "--data.paths=[a]", "--run.output=out"]
    assert list(load_config(str(tmp_path / "null.yaml"), needed).all_streams()) == ["main"]


def test_a_streams_seed_is_its_own_whatever_stands_beside_it():
    terms = "objective: {logits_kl: 1}"
    both = load(f"--streams={{a: {{{terms}}}, b: {{{terms}}}}}", "--run.seed=5")
    turned = load(f"--streams={{b: {{{terms}}}, a: {{{terms}}}}}", "--run.seed=5")
    assert both.stream_seed("a") == turned.stream_seed("a") != both.stream_seed("b")
    assert load("--run.seed=5").stream_seed("main") == 5


@pytest.mark.parametrize(
    ("streams", "sentence"),
    [
        ("3", "'streams' is a section of named entries"),
        ("{a: 3}", "'streams.a' is a section"),
        ("{a: }", "the objective of stream a is empty"),
        ("{a: {objective: {logits_kl: 1}, data: 3}}", "'streams.a.data' is a section"),
        ("{'': {objective: {logits_kl: 1}}}", "the stream name '' may have"),
        ("{a: {objective: {}}}", "the objective of stream a is empty"),
        ("{a: {objective: {logits_kl: -1}}}", "streams.a.objective.logits_kl must be at least 0"),
        ("{a: {objectives: {}}}", "unknown key 'streams.a.objectives'; the nearest known one is"),
        ("{a.b: {objective: {logits_kl: 1}}}", "the stream name 'a.b' may have"),
        ("{a: {objective: {logits_kl: 1}, weight: 0}}", "streams.a.weight must be positive"),
        ("{a: {objective: {logits_kl: 1}, micro_batch: 0}}", "streams.a.micro_batch"),
        (
            "{a: {objective: {logits_kl: 1}, data: {positions: skip}}}",
            "streams.a.data.positions must be one of contiguous, skip-gaussian, skip-uniform",
        ),
        (
            "{a: {objective: {hidden_cosine: 1, hidden_depths: [0, 1]}}}",
            "streams.a.objective.hidden_depths must be different shares in (0, 1]",
        ),
    ],
)
def test_bad_streams_are_refused_in_one_sentence(streams, sentence):
    with pytest.raises(UserError) as caught:
        load(f"--streams={streams}")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objective.logits_kl=1", "objective and streams are both given"),
        ("data.context_length=8", "set streams.NAME.data.context_length instead"),
        ("optimizer.global_batch=8", "set streams.NAME.global_batch instead"),
    ],
)
def test_a_setting_that_no_stream_takes_is_refused(override, sentence):
    with pytest.raises(UserError, match=sentence):
        load(f"--streams={OWN_SIZES}", f"--{override}")


def test_a_section_that_is_none_is_told_in_one_sentence(tmp_path):
    (tmp_path / "bad.yaml").write_text(f"optimizer: [3]\nstreams: {CPT}\n")
    with pytest.raises(UserError, match="'optimizer' is a section"):
        load_config(str(tmp_path / "bad.yaml"), [])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            [f"streams={CPT}", "data.context_length=257"],
            "stream long: data.context_length 257 is longer than the student's window",
        ),
        (
            [f"streams={LONGRED.replace(': 64', ': 65')}"],
            "stream short-to-long: data.context_length 65 is longer than the teacher's native",
        ),
        ([f"streams={CPT}", "optimizer.global_batch=3"], "stream long: a global batch of 3"),
        ([f"streams={CPT}", "optimizer.global_batch=4000"], "stream long: the data gives"),
        (
            [f"streams={LONGRED.replace('0.34, 1', '0.9, 1')}"],
            "stream short: objective.hidden_depths [0.9, 1.0] name a layer twice",
        ),
    ],
)
def test_streams_that_do_not_fit_are_refused(options, sentence, job, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments(job, tmp_path / "output", "trainable.mode=all", *options))
    assert caught.value.code == 1
    assert sentence in capsys.readouterr().err


def test_streams_of_different_text_share_a_cache(job, tmp_path):
    cache, terms = tmp_path / "cache", "objective: {logits_kl: 1}"
    other = f"data: {{paths: [{job / 'heldout.txt'}]}}"
    streams = f"{{a: {{{terms}}}, b: {{{terms}, {other}}}}}"
    options = [f"streams={streams}", f"data.cache={cache}", "optimizer.steps=1"]
    main(arguments(job, tmp_path / "output", *options))
    assert sorted(path.name for path in cache.iterdir()) == ["a", "b"]


def test_continued_pretraining_needs_no_teacher(job, tmp_path):
    options = ["trainable.mode=all", f"streams={CPT}", *CPT_SIZES, "optimizer.learning_rate=3e-3"]
    main(arguments(job, tmp_path / "output", *options))
    lines = metrics(tmp_path / "output")
    assert [line["tokens"] for line in lines] == [512 * (step + 1) for step in range(STEPS)]
    assert lines[-1]["loss"] == lines[-1]["loss_lm"] < lines[0]["loss"] - 0.3

    command = arguments(job, tmp_path / "other", *options)
    config, mesh = load_config(None, command), build_mesh("cpu", 1)
    plan = assemble.make_plan(config, mesh)
    teacher, student, _ = assemble.load_models(config, plan, mesh)
    assert teacher is None
    # no part of the loss is out of reach: every weight is trained
    assert student.trained.keys() == dict(student.decoder.named_parameters()).keys()


def test_longred_reports_every_stream_and_trains_all_weights(job, tmp_path):
    output = tmp_path / "output"
    main(arguments(job, output, "trainable.mode=all", f"streams={LONGRED}"))
    first, *_, last = metrics(output)
    tokens = 2 * 128 + 4 * CONTEXT + 2 * NATIVE
    assert (first["tokens"], last["tokens"]) == (tokens, STEPS * tokens)
    parts = {"long.lm": 0.5, "short.hidden": 1.875, "short-to-long.hidden": 1.25}
    assert first["loss"] == pytest.approx(sum(w * first[f"loss_{k}"] for k, w in parts.items()))
    before = load_file(job / "model" / "model.safetensors")
    after = load_file(output / "student" / "model.safetensors")
    unchanged = [name for name, value in before.items() if after[name].equal(value)]
    assert unchanged == []
    # streams of one text share its tokens
    assert (output / "tokens-long").is_dir() and not (output / "tokens-short").exists()
    assert json.loads((output / "run.json").read_text())["streams"].keys() == {
        "long",
        "short",
        "short-to-long",
    }


def test_preflight_counts_the_tokens_of_all_streams(job, tmp_path, capsys):
    command = arguments(job, tmp_path / "output", "trainable.mode=all", f"streams={LONGRED}")
    main(["--preflight", *command])
    assert f"s a step of {2 * 128 + 4 * CONTEXT + 2 * NATIVE:,} tokens" in capsys.readouterr().out
