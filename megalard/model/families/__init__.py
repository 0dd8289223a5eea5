"""The model families that can be read: one file per family, and the table of all of them."""

from __future__ import annotations

from megalard.model.families.family import Family
from megalard.model.families.llama import LLAMA
from megalard.model.families.mistral import MINISTRAL, MISTRAL
from megalard.model.families.olmo2 import OLMO2
from megalard.model.families.phi3 import PHI3
from megalard.model.families.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3, OLMO2, PHI3)
}

# Why models of other families are refused, by the beginning of their ``model_type``.
REFUSED = {
    "gemma": "it scales embeddings and adds one to its norm weights",
    "granite": "it multiplies embeddings, residuals, attention and logits by its own constants",
    "cohere": "it uses layer norms, parallel blocks and interleaved RoPE",
    "glm": "its RoPE is interleaved and partial, with fused gate and up projections",
    "olmo": "it uses layer norms without weights",
    "olmo3": "it scales RoPE in its layers with full attention alone",
    "olmoe": "it is a mixture of experts",
    "phi": "it uses layer norms, and runs attention and MLP in parallel",
    "phimoe": "it is a mixture of experts",
    "phi4": "it reads images and sound",
    "smollm3": "some of its layers have no RoPE",
    "mixtral": "it is a mixture of experts",
    "mistral3": "it reads images",
    "mistral4": "it is a mixture of experts with latent attention",
    "ministral3": "it scales queries by their position",
    "deepseek": "it is a mixture of experts with latent attention",
    "llama4": "it is a mixture of experts with interleaved RoPE",
    "falcon": "its blocks run attention and MLP in parallel, with fused projections",
    "stablelm": "its RoPE is partial and its norms are layer norms",
    "gpt": "it does not use rotary half-split RoPE with RMS norms and SwiGLU",
}


def reason_to_refuse(model_type: str) -> str:
    """Return why a model of an unsupported family is refused."""
    if "moe" in model_type:
        return "it is a mixture of experts"
    prefixes = [prefix for prefix in REFUSED if model_type.startswith(prefix)]
    if not prefixes:
        return "megalard has no decoder for its layers"
    return REFUSED[max(prefixes, key=len)]
