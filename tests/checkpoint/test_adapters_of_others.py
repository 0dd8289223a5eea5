"""Adapters as peft writes them in all its variants: merged as peft merges them, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.command_line import user_error
from tests.logits import assert_same_logits, decoder_logits, load, random_tokens
from tests.models import make_model

TOKENS = random_tokens(2, 24)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# peft.LoraConfig's arguments, in addition to rank 4 and alpha 8 on q and v.
MERGED = {
    "plain": {},
    "all linear layers": {"target_modules": "all-linear"},
    "mlp and o": {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]},
    "some layers": {"layers_to_transform": [1]},
    "biases of a model without any": {"bias": "lora_only"},
    "an expression": {"target_modules": r".*layers\.(0|2)\.self_attn\.(q|k)_proj"},
}
REFUSED = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "the embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed"),
    "scaled by the root of the rank": ({"use_rslora": True}, "use_rslora"),
    "ranks by name": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "alphas by name": ({"alpha_pattern": {"layers.0.self_attn.q_proj": 64}}, "alpha_pattern"),
    "embeddings and head": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "lm_head.weight"),
    "LongLoRA": ({"modules_to_save": ["embed_tokens", "norm"]}, "embed_tokens.weight"),
    "some tokens": ({"trainable_token_indices": [3, 4]}, "token"),
    "biases of LoRA": ({"lora_bias": True}, "bias"),
}


def make_adapter(folder: Path, base: Path, **options) -> Path:
    """Write an adapter as peft writes it, with random values."""
    network = AutoModelForCausalLM.from_pretrained(base)
    usual = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    config = peft.LoraConfig(**usual | {"task_type": "CAUSAL_LM"} | options)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(network, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0, 0.2)
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of_peft(adapter: Path, base: Path) -> torch.Tensor:
    """Return the logits of the base merged with an adapter by peft, in float64."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    merged = peft.PeftModel.from_pretrained(network, adapter).merge_and_unload()
    return merged(TOKENS, use_cache=False).logits


def change(adapter: Path, file: str, function) -> None:
    """Rewrite the tensors or the configuration of an adapter."""
    if file == CONFIG:
        (adapter / file).write_text(json.dumps(function(json.loads((adapter / file).read_text()))))
    else:
        save_file(function(load_file(adapter / file)), adapter / file)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("adapters") / "base")


@pytest.mark.parametrize("name", MERGED)
def test_an_adapter_is_merged_as_peft_merges_it(name, base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", base, **MERGED[name])
    expected = logits_of_peft(adapter, base)
    assert_same_logits(decoder_logits(load(adapter), TOKENS), expected)
    plain = decoder_logits(load(base), TOKENS)
    assert float((plain - expected).norm() / expected.norm()) > 0.01, "the adapter does nothing"


@pytest.mark.parametrize("name", REFUSED)
def test_a_variant_that_is_not_merged_is_refused(name, base, tmp_path):
    options, part = REFUSED[name]
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    assert part.lower() in user_error(load, adapter).lower()


def test_trained_biases_are_refused(tmp_path):
    base = make_model("qwen2", tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, bias="lora_only")
    # Not "bias" alone, which is in the name of the test's directory.
    assert "q_proj.base_layer.bias', which is not part" in user_error(load, adapter)


def test_a_head_of_its_own_on_a_tied_base(tmp_path):
    base = make_model("llama-tied", tmp_path / "base")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    assert "lm_head" in user_error(load, adapter)


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "unsloth/llama-3-8b-bnb-4bit"])
def test_a_base_by_its_name_on_the_hub_must_be_given(name, base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", base)
    change(adapter, CONFIG, lambda config: config | {"base_model_name_or_path": name})
    assert name in user_error(load, adapter)
    from megalard.checkpoint.open import open_model

    given = open_model(adapter, base).weights
    named = make_adapter(tmp_path / "named", base)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(given.read(q_proj), open_model(named).weights.read(q_proj))


def test_empty_tensors_of_a_sharded_optimizer_are_refused(base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", base)
    nothing = torch.zeros(0)
    change(adapter, WEIGHTS, lambda t: {n: v if "lora_A" in n else nothing for n, v in t.items()})
    assert "lora_B" in user_error(load, adapter)


@pytest.mark.parametrize(
    ("old", "new"),
    [("model.model.model", "model.model._orig_mod.model"), ("lora_A.", "lora_A.default.")],
)
def test_names_of_a_wrapped_model_are_refused(old, new, base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", base)
    change(adapter, WEIGHTS, lambda t: {n.replace(old, new): v for n, v in t.items()})
    assert new.removeprefix("model.model.").strip(".") in user_error(load, adapter)


def test_an_adapter_in_bf16(base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", base)
    change(adapter, WEIGHTS, lambda t: {n: v.bfloat16() for n, v in t.items()})
    # peft multiplies the factors in fp32 too. In bf16 the products would be rounded by 2^-9.
    assert_same_logits(decoder_logits(load(adapter), TOKENS), logits_of_peft(adapter, base))


def test_a_pickled_adapter_is_refused_with_the_way_out(base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", base)
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    sentence = user_error(load, adapter)
    assert "adapter_model.bin" in sentence and "safetensors" in sentence
