"""Every key that transformers knows of a family, or reads in its model, is accounted for.

The classes and the sources of the installed transformers are looked at, and of version 4.57 where
tests/run.sh has installed it.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import transformers
from transformers import CONFIG_MAPPING

from megalard.model.families import FAMILIES
from megalard.model.families.family import READ, REQUIRED, WITHOUT_EFFECT
from tests import old_transformers

PRESENT, OLD = Path(transformers.__file__).parent, old_transformers.FOLDER / "transformers"
needs_old = pytest.mark.skipif(
    not OLD.is_dir(), reason="needs transformers 4.57 next to the tests (tests/run.sh)"
)
VERSIONS = [pytest.param(PRESENT, id="5"), pytest.param(OLD, id="4.57", marks=needs_old)]
# What the functions of RoPE read from its section; a key more may change the table.
ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    *("partial_rotary_factor", "rope_scaling"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_the_class_is_in_one_of_the_three_sets(name):
    """A key that a new transformers adds is named here, before it changes logits unseen."""
    family = FAMILIES[name]
    keys = [field.name for field in dataclasses.fields(CONFIG_MAPPING[name])]
    assert len(keys) > 20
    assert [key for key in keys if not family.lists(key)] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_no_key_is_in_two_sets(name):
    family = FAMILIES[name]
    read = READ | family.read
    without_effect = {*WITHOUT_EFFECT, *family.without_effect}
    assert read & without_effect == set()
    assert set(family.required_values()) & (read | without_effect) == set()
    # What a family reads, it may take at any value although other families refuse it.
    assert set(REQUIRED) - set(family.required_values()) == set(REQUIRED) & family.read


@pytest.mark.parametrize("name", FAMILIES)
def test_the_keys_that_a_family_reads_are_keys_of_its_class(name):
    family, kind = FAMILIES[name], CONFIG_MAPPING[name]
    old = {"partial_rotary_factor"}  # transformers 5 has it among the RoPE parameters.
    assert family.read - old <= {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_required_values_are_the_defaults_of_the_class(name):
    """A file that leaves such a key out is not refused by mistake, or read wrongly."""
    pad = {"pad_token_id": 0} if name == "phi3" else {}
    config = CONFIG_MAPPING[name](**pad).to_dict()
    for key, value in FAMILIES[name].required_values().items():
        default = config.get(key)
        assert default is None or default == value or (not default and not value), key


def source_of(root: Path, kind: str, name: str) -> ast.Module:
    """Return the source of a family's file, such as ``modeling_llama.py``, in some version."""
    path = root / "models" / name / f"{kind}_{name}.py"
    return ast.parse(path.read_text(encoding="utf-8"))


def keys_read(source: ast.AST) -> set[str]:
    """Return what a source reads of its configuration: ``config.X`` or ``getattr(config, "X")``."""

    def is_config(node: ast.AST) -> bool:
        name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
        return name == "config"

    keys = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            keys.add(node.attr)
        is_getattr = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr"
        if is_getattr and is_config(node.args[0]) and isinstance(node.args[1], ast.Constant):
            keys.add(str(node.args[1].value))
    return keys


@pytest.mark.parametrize("root", VERSIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_that_the_model_reads_is_accounted_for(name, root):
    """A line of a new transformers that reads one more key is noticed here."""
    keys = keys_read(source_of(root, "modeling", name))
    assert {"hidden_size", "rms_norm_eps", "num_attention_heads"} <= keys
    family = FAMILIES[name]
    assert sorted(key for key in keys if not family.lists(key)) == []


@needs_old
@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_the_old_class_is_in_one_of_the_three_sets(name):
    """In version 4 the keys are the arguments of the classes, and what their base class takes."""
    keys = set()
    for node in ast.walk(source_of(OLD, "configuration", name)):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            keys |= {argument.arg for argument in node.args.args} - {"self"}
    assert {"hidden_size", "rope_theta"} <= keys
    family = FAMILIES[name]
    assert sorted(key for key in keys if not family.lists(key)) == []


@pytest.mark.parametrize("root", VERSIONS)
def test_every_key_that_rope_reads_is_one_of_these(root):
    source = ast.parse((root / "modeling_rope_utils.py").read_text(encoding="utf-8"))
    keys = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            keys.add(node.slice.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("get", "pop"):
            keys |= {argument.value for argument in node.args[:1] if hasattr(argument, "value")}
    # A word that begins with a capital is a type in an annotation.
    keys = {k for k in keys if isinstance(k, str) and k.isidentifier() and k[0].islower()}
    assert {"factor", "beta_fast", "long_factor"} <= keys
    assert keys - ROPE_KEYS == set()


def test_a_key_that_a_model_begins_to_read_is_noticed():
    source = """
class Attention:
    def __init__(self, config):
        self.scale = config.attention_multiplier * getattr(config, "scale_of_logits", 1.0)

    def forward(self, x):
        return x * self.config.residual_multiplier * self.other.hidden_size
"""
    keys = keys_read(ast.parse(source))
    assert keys == {"attention_multiplier", "scale_of_logits", "residual_multiplier"}
    assert not any(FAMILIES[name].lists(key) for key in keys for name in FAMILIES)
