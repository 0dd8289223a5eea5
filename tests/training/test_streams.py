"""Several kinds of text in one run, from the command line and by the functions that open them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from megalard.config.file import load_config
from megalard.data.blocks import DocumentBlocks
from megalard.data.token_store import TokenStore
from megalard.parallel.mesh import build_mesh
from megalard.training.plan import make_plan
from megalard.training.stages import stages_of
from megalard.training.streams import make_loaders, open_streams
from tests.command_line import megalard, refusal
from tests.jobs import CONTEXT, NATIVE, STEPS, arguments, make_job, metrics, train

CPT = "{long: {objective: {language_modelling: 1}}}"
# The sizes of the job are meant for relations.
CPT_SIZES = ["data.context_length=256", "optimizer.global_batch=2"]
LONGRED = (
    "{long: {weight: 0.5, objective: {language_modelling: 1}, data: {context_length: 128}, "
    "global_batch: 2}, "
    "short: {weight: 1.875, objective: {hidden_cosine: 1, hidden_depths: [0.34, 1]}}, "
    "short-to-long: {weight: 1.25, objective: {hidden_cosine: 1}, "
    "data: {context_length: 64, positions: skip-gaussian}, global_batch: 2}}"
)
LONGRED_TOKENS = 2 * 128 + 4 * CONTEXT + 2 * NATIVE


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job."""
    return make_job(tmp_path_factory.mktemp("streams"))


@pytest.fixture
def opened(job, tmp_path):
    """A function that opens the streams of a configuration: stages, plan, mesh and stores."""

    def open_all(*options: str, **keywords):
        config = load_config(None, arguments(job, tmp_path / "output", *options))
        mesh = build_mesh("cpu", 1)
        plan, stages = make_plan(config, mesh), stages_of(config)
        stores = open_streams(stages, tmp_path / "folder", plan, mesh, **keywords)
        return stages, plan, mesh, stores

    return open_all


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
        ([f"streams={CPT}", "optimizer.global_batch=4000"], "stream long: the data has 220"),
        (
            [f"streams={LONGRED.replace('0.34, 1', '0.9, 1')}"],
            "stream short: objective.hidden_depths [0.9, 1.0] name a layer twice",
        ),
        (
            ["stages={a: {}, b: {data: {context_length: 65}}}"],
            "stage b: data.context_length 65 is longer than the teacher's native",
        ),
        (
            [f"stages={{a: {{}}, b: {{streams: {CPT}, optimizer: {{global_batch: 3}}}}}}"],
            "stage b, stream long: a global batch of 3",
        ),
    ],
)
def test_streams_that_do_not_fit_are_refused(options, sentence, job, tmp_path, capsys):
    command = arguments(job, tmp_path / "output", "trainable.mode=all", *options)
    assert sentence in refusal(capsys, "train", *command)


def test_streams_of_one_text_share_a_store(opened, tmp_path):
    terms = "objective: {logits_kl: 1}"
    _, _, _, stores = opened(f"streams={{a: {{{terms}}}, b: {{{terms}}}}}")
    assert stores["main"]["a"] is stores["main"]["b"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["tokens-a"]


@pytest.mark.parametrize("difference", ["bos: 'no'", "text_key: content", "eos: 'no'"])
def test_streams_that_read_a_text_differently_have_stores_of_their_own(
    difference, opened, tmp_path
):
    terms = "objective: {logits_kl: 1}"
    both = f"{{a: {{{terms}}}, b: {{{terms}, data: {{{difference}}}}}}}"
    opened(f"streams={both}", "data.eos=yes")
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == ["tokens-a", "tokens-b"]


def test_stages_have_stores_by_their_names(opened, job, tmp_path):
    long = f"{{data: {{paths: [{job / 'heldout.txt'}]}}}}"
    _, _, _, stores = opened(f"stages={{a: {{}}, b: {long}, c: {{}}}}")
    assert stores["a"]["main"] is stores["c"]["main"] is not stores["b"]["main"]
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == ["tokens-a", "tokens-b"]


def test_streams_of_different_text_share_a_cache(job, tmp_path):
    cache, terms = tmp_path / "cache", "objective: {logits_kl: 1}"
    other = f"data: {{paths: [{job / 'heldout.txt'}]}}"
    streams = f"{{a: {{{terms}}}, b: {{{terms}, {other}}}}}"
    options = [f"streams={streams}", f"data.cache={cache}", "optimizer.steps=1"]
    train(arguments(job, tmp_path / "output", *options))
    assert sorted(path.name for path in cache.iterdir()) == ["a", "b"]


def test_a_preflight_uses_a_cache_that_exists_and_makes_none(opened, tmp_path):
    cache = tmp_path / "cache"
    opened(f"data.cache={cache}", read_only=True)
    assert not cache.exists() and (tmp_path / "folder" / "tokens").is_dir()
    _, _, _, stores = opened(f"data.cache={cache}")
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    _, _, _, again = opened(f"data.cache={cache}", read_only=True)
    assert len(again["main"]["main"].tokens) == len(stores["main"]["main"].tokens)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == written


def test_a_prepared_store_is_used_in_its_place(opened, job, tmp_path):
    assert megalard("prepare", *_prepare(job, tmp_path / "store")) == 0
    _, _, _, stores = opened(f"data.paths={tmp_path / 'store'}")
    prepared = TokenStore.open(tmp_path / "store")
    assert np.array_equal(stores["main"]["main"].tokens, prepared.tokens)
    assert not (tmp_path / "folder").exists()


def _prepare(job, output) -> list[str]:
    return [str(job / "train.txt"), "--model", str(job / "model"), "--output", str(output)]


def test_the_settings_of_the_data_reach_the_loader(opened):
    """Positions, packing, tails, context length and batch sizes, one stream each."""
    terms = "objective: {logits_kl: 1}"
    streams = (
        f"{{a: {{{terms}, data: {{positions: skip-uniform}}}}, "
        f"b: {{{terms}, data: {{packing: false, context_length: 16}}, global_batch: 6}}, "
        f"c: {{{terms}, data: {{packing: false, drop_tails: true}}, micro_batch: 1}}}}"
    )
    (stage,), plan, mesh, stores = opened(f"streams={streams}")
    loaders = make_loaders(stage, stores, plan, mesh)
    with loaders:
        a, b, c = (loaders.loaders[name] for name in "abc")
        batches = loaders.step(0, mesh.device)
    assert (a.positions, b.positions) == ("skip-uniform", "contiguous")
    assert batches["a"][0].student_position_bs.max() > CONTEXT
    assert batches["b"][0].student_position_bs.max() < 16
    assert not isinstance(a.blocks, DocumentBlocks) and isinstance(b.blocks, DocumentBlocks)
    # Rounded up with the end of the document, and rounded down without it.
    tokens = len(stores["main"]["b"].tokens)
    assert tokens % 16 > 1 and tokens % CONTEXT > 1
    assert (len(b.blocks), len(c.blocks)) == (tokens // 16 + 1, tokens // CONTEXT)
    shapes = {name: [tuple(x.tokens_bs.shape) for x in part] for name, part in batches.items()}
    assert shapes == {"a": [(2, CONTEXT)] * 2, "b": [(2, 16)] * 3, "c": [(1, CONTEXT)] * 4}


def test_continued_pretraining_needs_no_teacher(job, tmp_path):
    options = ["trainable.mode=all", f"streams={CPT}", *CPT_SIZES, "optimizer.learning_rate=3e-3"]
    train(arguments(job, tmp_path / "output", *options))
    lines = metrics(tmp_path / "output")
    assert [line["tokens"] for line in lines] == [512 * (step + 1) for step in range(STEPS)]
    assert lines[-1]["loss"] == lines[-1]["loss_lm"] < lines[0]["loss"] - 0.3


def test_longred_reports_every_stream_and_trains_all_weights(job, tmp_path):
    output = tmp_path / "output"
    train(arguments(job, output, "trainable.mode=all", f"streams={LONGRED}"))
    first, *_, last = metrics(output)
    assert (first["tokens"], last["tokens"]) == (LONGRED_TOKENS, STEPS * LONGRED_TOKENS)
    parts = {"long.lm": 0.5, "short.hidden": 1.875, "short-to-long.hidden": 1.25}
    assert first["loss"] == pytest.approx(sum(w * first[f"loss_{k}"] for k, w in parts.items()))
    before = load_file(job / "model" / "model.safetensors")
    after = load_file(output / "student" / "model.safetensors")
    unchanged = [name for name, value in before.items() if after[name].equal(value)]
    assert unchanged == []
    # Streams of one text share its tokens.
    assert (output / "tokens-long").is_dir() and not (output / "tokens-short").exists()
    assert json.loads((output / "run.json").read_text())["streams"].keys() == {
        "long",
        "short",
        "short-to-long",
    }


def test_preflight_counts_the_tokens_of_all_streams(job, tmp_path, capsys):
    command = arguments(job, tmp_path / "output", "trainable.mode=all", f"streams={LONGRED}")
    assert megalard("preflight", *command) == 0
    assert f"s per step of {LONGRED_TOKENS:,} tokens" in capsys.readouterr().out
