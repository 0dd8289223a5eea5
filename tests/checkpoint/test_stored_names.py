"""Tensors under other names: fused projections, files without the prefix, and their LoRA pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalard.checkpoint.stored_names import StoredWeights, stored_pairs, under_our_names
from megalard.errors import UserError
from megalard.model.parameter_slice import ParameterSlice
from megalard.model.spec import ModelSpec
from tests.model.families.configs import spec_of

LAYER = "model.layers.0."
PHI = {"pad_token_id": 0, "num_hidden_layers": 1}
# Four heads of 8 features and two K/V heads.
ROWS = {"q": 32, "k": 16, "v": 16}


class InMemory:
    """Tensors of a directory that is not there."""

    directory = Path("/the/model")

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def files(self) -> list[Path]:
        return []

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        return self.tensors[name] if held is None else held.cut(self.tensors[name])


def phi(**changes) -> ModelSpec:
    """Return the spec of a Phi-3 with one layer."""
    return spec_of("phi3", **PHI | changes)


def random(*shape: int) -> torch.Tensor:
    """Return a random tensor, the same for one shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def phi_tensors() -> dict[str, torch.Tensor]:
    """Return the tensors of a file of Phi-3, as its modules in transformers have them."""
    return {
        "model.embed_tokens.weight": random(67, 32),
        f"{LAYER}self_attn.qkv_proj.weight": random(64, 32),
        f"{LAYER}self_attn.o_proj.weight": random(32, 32),
        f"{LAYER}mlp.gate_up_proj.weight": random(96, 32),
        "lm_head.weight": random(67, 32),
    }


def test_files_that_have_our_names_are_not_wrapped():
    files = InMemory({"model.embed_tokens.weight": random(67, 32)})
    assert under_our_names(files, spec_of("llama")) is files


def test_a_fused_tensor_is_read_in_parts():
    tensors = phi_tensors()
    weights = under_our_names(InMemory(tensors), phi())
    fused = tensors[f"{LAYER}self_attn.qkv_proj.weight"]
    parts = dict(zip("qkv", fused.split([32, 16, 16]), strict=True))
    for name, part in parts.items():
        full = f"{LAYER}self_attn.{name}_proj.weight"
        assert weights.shape(full) == (ROWS[name], 32)
        assert torch.equal(weights.read(full), part)
        # Rows and columns of a part.
        rows = ParameterSlice((ROWS[name], 32), 0, 3, 9, 1)
        assert torch.equal(weights.read(full, rows), part[3:12])
        columns = ParameterSlice((ROWS[name], 32), 1, 3, 9, 1)
        assert torch.equal(weights.read(full, columns), part[:, 3:12])
    gate, up = tensors[f"{LAYER}mlp.gate_up_proj.weight"].split(48)
    assert torch.equal(weights.read(f"{LAYER}mlp.gate_proj.weight"), gate)
    assert torch.equal(weights.read(f"{LAYER}mlp.up_proj.weight"), up)
    assert f"{LAYER}self_attn.qkv_proj.weight" not in weights.names()
    with pytest.raises(UserError, match=r"has no tensor model.norm.weight"):
        weights.read("model.norm.weight")


def test_a_fused_tensor_with_other_rows_is_named():
    tensors = phi_tensors() | {f"{LAYER}self_attn.qkv_proj.weight": random(63, 32)}
    with pytest.raises(UserError, match=r"has shape \[63, 32\], but config.json implies 64 rows"):
        under_our_names(InMemory(tensors), phi())


def test_a_tensor_that_is_stored_twice_is_named():
    tensors = phi_tensors() | {f"{LAYER}self_attn.k_proj.weight": random(16, 32)}
    with pytest.raises(UserError, match=r"k_proj.weight is stored twice in /the/model, in .*qkv"):
        under_our_names(InMemory(tensors), phi())


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        # A model that was saved without its head, as transformers' AutoModel saves it.
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.lm_head.weight", "lm_head.weight"),
        # What the decoder does not have keeps its name.
        ("layers.9.self_attn.q_proj.weight", "layers.9.self_attn.q_proj.weight"),
        ("extra.weight", "extra.weight"),
    ],
)
def test_the_prefix_is_added_or_removed(stored, ours):
    value = random(67, 32)
    weights = under_our_names(InMemory({stored: value}), spec_of("llama"))
    assert weights.names() == [ours] and torch.equal(weights.read(ours), value)


def test_the_head_of_a_tied_model_serves_as_embedding():
    value = random(67, 32)
    spec = spec_of("llama", tie_word_embeddings=True)
    weights = under_our_names(InMemory({"lm_head.weight": value}), spec)
    assert weights.names() == ["model.embed_tokens.weight"]
    assert torch.equal(weights.read("model.embed_tokens.weight"), value)


def test_a_model_is_written_under_the_names_of_its_family():
    tensors = phi_tensors()
    stored = StoredWeights(under_our_names(InMemory(tensors), phi()), phi())
    assert sorted(stored.names()) == sorted(tensors)
    for name, value in tensors.items():
        assert stored.shape(name) == tuple(value.shape) and stored.dtype(name) == value.dtype
        assert torch.equal(stored.read(name), value)


def lora(**pairs: tuple[torch.Tensor, torch.Tensor]) -> InMemory:
    """Return LoRA pairs of projections of the first layer."""
    tensors = {}
    for module, (a, b) in pairs.items():
        part = "mlp" if module in ("gate", "up", "down") else "self_attn"
        tensors |= {f"{LAYER}{part}.{module}_proj.lora_A": a}
        tensors |= {f"{LAYER}{part}.{module}_proj.lora_B": b}
    return InMemory(tensors)


def test_pairs_of_parts_are_one_pair_with_the_same_product():
    """The product of the stored pair is the update of q on top of that of v; k has none."""
    q, v, o = ((random(6, 32), random(rows, 6)) for rows in (32, 16, 33))
    o = (o[0], random(32, 6))
    trained = {"lora": {"rank": 6, "alpha": 9.0, "dropout": 0.0}}
    pairs, section = stored_pairs(lora(q=q, v=v, o=o), trained, phi())
    stem = f"{LAYER}self_attn.qkv_proj"
    assert sorted(pairs.names()) == sorted(
        f"{module}.{kind}"
        for module in (stem, f"{LAYER}self_attn.o_proj")
        for kind in ("lora_A", "lora_B")
    )
    assert section["lora"] == {"rank": 18, "alpha": 27.0, "dropout": 0.0}
    a, b = pairs.read(f"{stem}.lora_A"), pairs.read(f"{stem}.lora_B")
    assert tuple(a.shape) == pairs.shape(f"{stem}.lora_A") == (18, 32)
    assert tuple(b.shape) == pairs.shape(f"{stem}.lora_B") == (64, 18)
    update = torch.cat([q[1] @ q[0], torch.zeros(16, 32), v[1] @ v[0]])
    torch.testing.assert_close(b @ a, update)
    # alpha / rank is the same for all, so the product of o is unchanged as well.
    stem = f"{LAYER}self_attn.o_proj"
    product = pairs.read(f"{stem}.lora_B") @ pairs.read(f"{stem}.lora_A")
    torch.testing.assert_close(product, o[1] @ o[0])


def test_pairs_of_other_families_stay_as_they_are():
    pairs = lora(q=(random(6, 32), random(32, 6)))
    trained = {"lora": {"rank": 6, "alpha": 9.0}}
    assert stored_pairs(pairs, trained, spec_of("llama")) == (pairs, trained)


def test_a_pair_of_a_fused_tensor_is_one_a_for_all_parts():
    """An adapter of PEFT on qkv_proj."""
    a, b = random(6, 32), random(64, 6)
    stem = f"{LAYER}self_attn.qkv_proj"
    weights = under_our_names(InMemory({f"{stem}.lora_A": a, f"{stem}.lora_B": b}), phi())
    for name, rows in zip("qkv", b.split([32, 16, 16]), strict=True):
        module = f"{LAYER}self_attn.{name}_proj"
        assert torch.equal(weights.read(f"{module}.lora_A"), a)
        assert torch.equal(weights.read(f"{module}.lora_B"), rows)
