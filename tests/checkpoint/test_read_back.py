"""What was written is opened as a stranger would, and refused if it is another model."""

from __future__ import annotations

import dataclasses

import pytest

from megalard.checkpoint.open import open_model
from megalard.checkpoint.read_back import reading_back
from megalard.model.rope import rope_table
from tests.command_line import user_error
from tests.conversions import make_adapter
from tests.models import change_config, make_model, scale_rope


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model."""
    return make_model("qwen2-windows", tmp_path_factory.mktemp("read-back") / "model")


def check(meant, written) -> None:
    """Compare a directory with the model that was meant."""
    reading_back(meant, rope_table(meant), "the/student")(written)


def test_the_model_that_was_meant_passes(model):
    check(open_model(model).spec, model)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"norm_eps": 0.5}, "its norm_eps is read as 1e-06 and is 0.5"),
        ({"windows": (None,) * 3}, "its windows is read as (None, 5, 5) and is"),
        ({"max_positions": 128}, "its max_positions is read as 64 and is 128"),
    ],
)
def test_another_value_is_named(model, changes, difference):
    meant = dataclasses.replace(open_model(model).spec, **changes)
    sentence = user_error(check, meant, model)
    assert difference in sentence
    assert sentence.startswith("the/student would be read as another model than was meant: ")
    assert "Nothing was written there, and checkpoints are kept" in sentence


def test_another_rope_is_named(model, tmp_path):
    scaled = make_model("qwen2-windows", tmp_path / "scaled")
    scale_rope(scaled)
    sentence = user_error(check, open_model(model).spec, scaled)
    assert "its RoPE is read as {'rope_type': 'linear'" in sentence
    check(open_model(scaled).spec, scaled)


def test_a_lost_tensor_is_named(model, tmp_path):
    """A file of the index that is not there, or a config.json of more layers than the weights."""
    deeper = make_model("qwen2", tmp_path / "deeper")
    change_config(deeper, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    sentence = user_error(check, open_model(deeper).spec, deeper)
    assert "has no tensor model.layers.3." in sentence


def test_an_adapter_is_compared_by_its_config(model, tmp_path):
    """Its directory has the config.json of the student, and its base may be anywhere."""
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "not-here")
    (adapter / "config.json").write_bytes((model / "config.json").read_bytes())
    spec = open_model(model).spec
    check(spec, adapter)
    change_config(adapter, rms_norm_eps=0.5)
    assert "its norm_eps is read as 0.5" in user_error(check, spec, adapter)
