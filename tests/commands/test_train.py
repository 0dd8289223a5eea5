"""``megalard train`` and ``megalard preflight``: recipes, overrides, and wrong arguments."""

from __future__ import annotations

import json

import pytest

from tests.command_line import megalard, refusal
from tests.jobs import arguments, make_job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job."""
    return make_job(tmp_path_factory.mktemp("train-command"))


def test_a_configuration_file_and_overrides_make_a_run(job, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("optimizer: {steps: 7, learning_rate: 0.5}\nrun: {seed: 3}\n")
    words = arguments(job, tmp_path / "output", "optimizer.steps=2")
    words = [word for word in words if "learning_rate" not in word]
    assert megalard("train", "--config", config, *words) == 0
    note = json.loads((tmp_path / "output" / "run.json").read_text())
    assert note["optimizer"]["steps"] == 2
    assert note["optimizer"]["learning_rate"] == 0.5 and note["run"]["seed"] == 3


def test_a_recipe_is_given_by_its_name(job, tmp_path, capsys):
    """The rank of the recipe fits no model of this size, but any other does."""
    words = ["--config", "llama2-7b-x8", *arguments(job, tmp_path / "output", "optimizer.steps=1")]
    assert megalard("train", *words, "--trainable.lora.rank=2") == 0
    note = json.loads((tmp_path / "output" / "run.json").read_text())
    assert note["trainable"]["lora"]["rank"] == 2
    assert note["optimizer"]["min_ratio"] == 0.9


def test_preflight_is_an_option_and_a_command(job, tmp_path, capsys):
    words = arguments(job, tmp_path / "output")
    for command in (("train", "--preflight"), ("preflight",)):
        assert megalard(*command, *words) == 0
        assert "preflight passed; nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--config", "/no/such.yaml"], "cannot read the config file"),
        (["--config", "no-such-recipe"], "is neither a file nor a recipe"),
        (["stray"], "expected --section.key value, got 'stray'"),
        (["--optimizer.steps"], "--optimizer.steps needs a value"),
        (["--optimizer.step", "3"], "the nearest known one is 'optimizer.steps'"),
        ([], "model.teacher"),
    ],
)
@pytest.mark.parametrize("command", ["train", "preflight"])
def test_wrong_arguments_are_one_sentence(command, words, sentence, capsys):
    assert sentence in refusal(capsys, command, *words)
