"""What makes a family of models: which keys of ``config.json`` matter, and what they mean.

Every key that the transformers class of a family knows is in one of three sets: it is read, it has
no effect on logits, or the model is refused unless the key has one value.
``tests/model/test_config_keys.py`` compares the sets with the installed transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

READ = frozenset(
    {
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "original_max_position_embeddings",
        "transformers_weights",
    }
)

WITHOUT_EFFECT = {
    **dict.fromkeys(
        ("architectures", "auto_map", "transformers_version", "name_or_path", "_name_or_path"),
        "the class is chosen by model_type, and code in the directory is not run",
    ),
    **dict.fromkeys(
        ("dtype", "torch_dtype", "use_bfloat16", "torchscript"),
        "tensors are read in the dtype of the files",
    ),
    **dict.fromkeys(
        ("use_cache", "pretraining_tp", "chunk_size_feed_forward", "gradient_checkpointing"),
        "the same result is computed in another way",
    ),
    **dict.fromkeys(
        ("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout", "classifier_dropout"),
        "dropout is switched off when a model is evaluated",
    ),
    **dict.fromkeys(
        ("initializer_range", "initializer_factor", "init_std"),
        "all weights are read from the files",
    ),
    **dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"),
        "the model reads ids and gives none of them a meaning",
    ),
    **dict.fromkeys(
        (
            "id2label",
            "label2id",
            "num_labels",
            "problem_type",
            "task_specific_params",
            "finetuning_task",
            "tokenizer_class",
            "prefix",
        ),
        "it describes a head or a task that is not read",
    ),
    **dict.fromkeys(
        (
            "output_hidden_states",
            "output_attentions",
            "return_dict",
            "use_return_dict",
            "attn_implementation",
            "_attn_implementation",
            "_attn_implementation_autoset",
            "experts_implementation",
            "distributed_config",
            "tie_last_hidden_states",
            "_commit_hash",
        ),
        "it chooses among implementations or outputs of transformers",
    ),
    **dict.fromkeys(
        ("is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder", "tf_legacy_loss"),
        "it only has a meaning for models with an encoder",
    ),
}

# The value that a key must have if it is given.
REQUIRED = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_causal": True,
    "per_layer_config": None,
    "pruned_heads": {},
    "partial_rotary_factor": 1.0,
    "rope_interleave": False,
    "rope_interleaved": False,
    "num_local_experts": None,
    "num_experts": None,
    "quantization_config": None,
}

# The reason that the error gives in place of the key and its value.
REASONS = {
    "is_causal": "its attention is bidirectional",
    "partial_rotary_factor": "its RoPE rotates only a part of each head",
    "rope_interleave": "its RoPE is interleaved",
    "rope_interleaved": "its RoPE is interleaved",
    "num_local_experts": "it is a mixture of experts",
    "num_experts": "it is a mixture of experts",
    "quantization_config": "its weights are quantized: give the unquantized checkpoint",
}

ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True)
class Family:
    """The models of one ``model_type`` of transformers.

    Attributes:
        model_type: the value in ``config.json``.
        flags: returns the fields of ``ModelSpec`` in which the family differs from Llama without
            biases, from the configuration object of transformers.
        read: the keys that are read, in addition to ``READ``.
        without_effect: key to the reason why it has no effect, in addition to ``WITHOUT_EFFECT``.
        required: key to the only value that is accepted, in addition to ``REQUIRED``.
        rope_types: the types of scaled RoPE that the family's class can describe; None for all.
        fused: the tensors of a layer that the files hold as one, by the name in the files.
    """

    model_type: str
    flags: Callable[[PretrainedConfig], dict[str, Any]]
    read: frozenset[str] = frozenset()
    without_effect: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    rope_types: tuple[str, ...] | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def reads(self, key: str) -> bool:
        """Whether a key sets the shape or a flag of the decoder."""
        return key in READ or key in self.read

    def has_no_effect(self, key: str) -> bool:
        """Whether a key has no effect on logits."""
        return key in WITHOUT_EFFECT or key in self.without_effect

    def required_values(self) -> dict[str, Any]:
        """Return key to the only value that is accepted, for keys that are not read."""
        values = {**REQUIRED, **self.required}
        return {key: value for key, value in values.items() if not self.reads(key)}

    def lists(self, key: str) -> bool:
        """Whether a key is in one of the three sets."""
        return self.reads(key) or self.has_no_effect(key) or key in self.required_values()


def windows_of(config: PretrainedConfig) -> dict[str, Any]:
    """Return the field ``windows`` for a family whose config lists the type of each layer.

    Raises:
        ValueError: a type is not supported, or a sliding layer has no window.
    """
    window = config.sliding_window
    kinds = {"full_attention": None, "sliding_attention": window}
    unknown = sorted(set(config.layer_types) - set(kinds))
    if unknown:
        raise ValueError(f"its layer_types hold {unknown[0]!r}, which it has no attention for")
    if window is None and "sliding_attention" in config.layer_types:
        raise ValueError("its layer_types hold 'sliding_attention', but it has no sliding_window")
    return {"windows": tuple(kinds[kind] for kind in config.layer_types)}
