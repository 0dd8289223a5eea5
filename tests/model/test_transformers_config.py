"""config.json is read by the classes of transformers, and their refusals are one sentence."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from megalard.errors import UserError
from megalard.model.transformers_config import as_transformers_reads

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4}


def test_missing_keys_have_the_defaults_of_the_class():
    read = as_transformers_reads(LLAMA, "the/model")
    assert isinstance(read, LlamaConfig)
    default = LlamaConfig(**LLAMA)
    assert read.rms_norm_eps == default.rms_norm_eps
    assert read.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": "32"}, "hidden_size"),
        ({"rope_scaling": {"rope_type": "linear"}}, "Missing required keys"),
        ({"num_attention_heads": 5}, "attention heads"),
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"dtype": [0]}, "no item|index out of range|dtype"),
    ],
)
def test_what_transformers_refuses_is_one_sentence(changes, reason):
    with pytest.raises(UserError, match=reason) as caught:
        as_transformers_reads(LLAMA | changes, "the/model")
    sentence = str(caught.value)
    assert sentence.startswith("the/model/config.json is refused by transformers (")
    assert sentence.endswith("correct it, or download it again")
    assert "\n" not in sentence and len(sentence) < 500


def test_code_in_the_directory_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "custom.py").write_text("raise SystemExit('the code ran')")
    auto_map = {"auto_map": {"AutoConfig": "custom.Config"}}
    assert isinstance(as_transformers_reads(LLAMA | auto_map, str(tmp_path)), LlamaConfig)
    with pytest.raises(UserError, match="refused by transformers"):
        as_transformers_reads({**auto_map, "model_type": "custom"}, str(tmp_path))
