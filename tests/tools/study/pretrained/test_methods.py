"""The methods of the study of a pre-trained model, and the recipes that their stages are."""

from __future__ import annotations

import json

import pytest

from megalard.config.recipes import title
from tests.models import make_model
from tools.study.pretrained.folder import Study
from tools.study.pretrained.methods import METHODS, RECIPES, STAGES, recipe

WINDOW, FACTOR = 256, 4


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    """A study whose teacher has a window of 256, without text."""
    folder = tmp_path_factory.mktemp("study")
    make_model("llama", folder / "teacher", max_position_embeddings=WINDOW)
    (folder / "corpus").mkdir()
    (folder / "corpus" / "corpus.json").write_text(json.dumps({"end_token": "<|end|>"}))
    return Study(folder, "manuals", "cpu")


def test_every_stage_has_a_recipe_and_every_recipe_a_stage():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(STAGES)
    assert all(title(recipe(stage)) for stage in STAGES)
    assert set(METHODS) == {
        *("linearard", "linearard-qk", "qk-attention", "logits", "ours", "cpt", "longred", "mix"),
        *("linearard+cpt", "linearard-qk+cpt", "qk-attention+cpt", "logits+cpt", "ours+cpt"),
    }
    assert METHODS["logits+cpt"].label == "logits KL, then CPT"


@pytest.mark.parametrize("name", list(METHODS))
def test_the_stages_share_the_tokens_and_know_the_windows(name, study):
    stages = METHODS[name].stages
    rates = tuple(STAGES[stage].rates[0] for stage in stages)
    config = study.config(stages, rates, "yarn", FACTOR, 400_000, seed=3)
    assert list(config.stages) == list(stages)
    assert (config.rope.type, config.rope.factor, config.run.seed) == ("yarn", 4.0, 3)
    for stage, rate in zip(config.all_stages().values(), rates, strict=True):
        assert stage.optimizer.learning_rate == rate
        read = stage.optimizer.steps * stage.tokens_per_step
        # A stage takes whole steps.
        assert read == pytest.approx(400_000 / len(stages), abs=stage.tokens_per_step)
        for stream, settings in stage.all_streams().items():
            data = settings.data
            assert data.eos == "yes" and data.end_token == "<|end|>"
            assert data.paths == [str(study.folder / "corpus" / "manuals" / "train")]
            if stream == "long":
                assert data.context_length == FACTOR * WINDOW
            else:
                assert settings.objective.needs_teacher
                assert data.context_length in (WINDOW // 4, WINDOW // 2, WINDOW)


def test_the_text_of_the_teacher_is_measured_at_short_lengths_and_by_position(study):
    assert study.short_lengths == (16, 64, 256)
    assert study.edges(4) == [1, 32, 128, 256, 512, 768, 1024]
