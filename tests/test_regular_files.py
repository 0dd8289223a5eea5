"""A named pipe or a device in place of a file is refused at once and never waited for."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from megalard.data.token_store import TokenStore
from megalard.training.run_folder import checkpoint_path
from tests.command_line import refusal, user_error
from tests.conversions import to_sharded
from tests.jobs import STEPS, arguments, interrupted, make_job, train

LIMIT_S = 120
# What is on a disk in place of a file.
KINDS = {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero")}

pytestmark = pytest.mark.parametrize("kind", KINDS)


@contextmanager
def limited():
    """Fail where something waits for ever."""

    def late(number, frame):
        raise AssertionError("it waited")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job with a complete run and a sharded copy of its model."""
    folder = make_job(tmp_path_factory.mktemp("regular"))
    train(arguments(folder, folder / "run", "checkpoint.save_every=4"))
    to_sharded(folder / "model", folder / "sharded")
    return folder


def put(kind: str, path: Path) -> None:
    """Put a pipe or a device in place of a file."""
    path.unlink(missing_ok=True)
    KINDS[kind](path)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "added_tokens.json",
    ],
)
def test_in_a_model(kind, name, job, tmp_path, capsys):
    model = shutil.copytree(job / "model", tmp_path / "model")
    put(kind, model / name)
    with limited():
        line = refusal(capsys, "train", *arguments(job, tmp_path / "o", f"model.teacher={model}"))
    # A tokenizer.json that is no file is as good as none.
    assert str(model) in line


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "tokenizer.json", "weights"])
def test_in_a_checkpoint(kind, name, job, tmp_path, capsys):
    checkpoint = shutil.copytree(job / "sharded", tmp_path / "sharded")
    file = "weights-00000-000.safetensors" if name == "weights" else name
    put(kind, checkpoint / file)
    with limited():
        line = refusal(capsys, "convert", "export", checkpoint, tmp_path / "out")
    assert str(checkpoint) in line


@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", "finished.json", "tokens/tokens.bin", "tokens/meta.json"]
)
def test_in_a_run(kind, name, job, tmp_path, capsys):
    output = interrupted(job / "run", tmp_path / "output")
    put(kind, output / name)
    with limited():
        line = refusal(capsys, "train", *arguments(job, output, "checkpoint.save_every=4"))
    assert str(output) in line


@pytest.mark.parametrize("name", ["running.json", "evaluation.json"])
def test_a_note_of_a_run_is_replaced(kind, name, job, tmp_path):
    output = interrupted(job / "run", tmp_path / "output")
    put(kind, output / name)
    with limited():
        train(arguments(job, output, "checkpoint.save_every=4"))


@pytest.mark.parametrize("place", ["file", "folder"])
def test_in_place_of_text(kind, place, job, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "good.txt").write_text("good")
    text = tmp_path / "texts" / "text.txt"
    put(kind, text)
    paths = text if place == "file" else tmp_path / "texts"
    with limited():
        line = refusal(capsys, "train", *arguments(job, tmp_path / "o", f"data.paths={paths}"))
    assert f"{text} is not a regular file" in line


@pytest.mark.parametrize("suffix", ["json", "npy", "txt"])
def test_in_place_of_a_table(kind, suffix, job, tmp_path, capsys):
    table = tmp_path / f"table.{suffix}"
    put(kind, table)
    options = ("rope.type=table", f"rope.table={table}")
    with limited():
        line = refusal(capsys, "train", *arguments(job, tmp_path / "o", *options))
    assert f"{table} is not a regular file" in line


def test_in_place_of_a_configuration(kind, job, tmp_path, capsys):
    put(kind, tmp_path / "c.yaml")
    with limited():
        line = refusal(capsys, "train", "--config", tmp_path / "c.yaml")
    assert f"{tmp_path / 'c.yaml'} is not a regular file" in line


@pytest.mark.parametrize("name", ["documents.npy", "checksums.npy", "tokens.bin", "meta.json"])
def test_in_a_token_store(kind, name, job, tmp_path):
    store = Path(shutil.copytree(job / "run" / "tokens", tmp_path / "tokens"))
    put(kind, store / name)
    with limited():
        assert str(store) in user_error(TokenStore.open, store)


def test_in_place_of_the_metrics_that_a_report_reads(kind, job, tmp_path, capsys):
    output = interrupted(job / "run", tmp_path / "output")
    put(kind, output / "metrics.jsonl")
    with limited():
        line = refusal(capsys, "report", output)
    assert f"{output / 'metrics.jsonl'} is not a regular file" in line


def test_in_place_of_a_lock(kind, job, tmp_path, capsys):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    KINDS[kind](partial / ".unfinished")
    checkpoint = checkpoint_path(job / "run" / "checkpoints", STEPS)
    with limited():
        line = refusal(capsys, "convert", "export", checkpoint, tmp_path / "out")
    assert f"{partial / '.unfinished'} is not a regular file" in line
