"""The methods and their recipes."""

from __future__ import annotations

import pytest

from megalard.config.file import load_config
from megalard.config.recipes import title
from tools.study.lengths import NATIVE_WINDOW, STUDENT_WINDOW, Sizes
from tools.study.methods import METHODS, RECIPES, SHORT_TOKENS, recipe

REQUIRED = ["--model.teacher=t", "--model.student=s", "--data.paths=[d]", "--run.output=o"]


def test_every_method_has_a_recipe_and_short_ones_read_a_sixtieth():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*METHODS, "pretrain"}
    long = {method.compared_at for method in METHODS.values() if method.is_long}
    assert long == {60 * SHORT_TOKENS}
    for name, method in METHODS.items():
        assert recipe(name).exists() and method.compared_at in method.milestones()
        assert method.milestones()[-1] == method.tokens


@pytest.mark.parametrize("name", [*METHODS, "pretrain"])
def test_a_recipe_fits_the_text_and_the_windows_of_the_study(name):
    config = load_config(str(recipe(name)), REQUIRED)
    for stream in config.all_streams().values():
        assert stream.data.eos == "yes", "the corpus has an end token after every document"
        window = NATIVE_WINDOW if stream.objective.needs_teacher else STUDENT_WINDOW
        assert stream.data.context_length <= window
    assert config.model.native_context is None, "the model's own window is used"
    assert len(title(recipe(name))) < 110, "a recipe begins with one short sentence"


def test_nothing_is_held_out_of_the_text_of_the_teacher():
    assert load_config(str(recipe("pretrain")), REQUIRED).evaluation.holdout == 0


def test_sizes_shrink_to_one():
    assert Sizes().divided_by(1) == Sizes()
    small = Sizes().divided_by(10**9)
    assert set(vars(small).values()) == {1}
