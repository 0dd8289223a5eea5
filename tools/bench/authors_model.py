"""The loss of the authors' implementation of LinearARD on models of transformers.

Their kernels are imported from a checkout of their repository. The models, the recording of q, k
and v and the sum of the relations are written here after their ``train.py`` (commit 23866f6).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from megalard.errors import UserError
from tools.bench.random_model import random_config

_ATTENTION = "record_qkv"
# Their script computes logits for this many positions at the end of a block.
_LOGITS = 512


def load_kernel(checkout: Path) -> Callable:
    """Return the function of the authors' repository that computes the KL of one relation.

    Raises:
        UserError: the directory is not a checkout of their repository.
    """
    folder = checkout / "kernels"
    if not (folder / "attention_KL" / "integration.py").is_file():
        raise UserError(
            f"{checkout} has no kernels/attention_KL: give a checkout of "
            "https://github.com/gracefulning/LinearARD"
        )
    sys.path.insert(0, str(folder))
    from attention_KL.integration import attn_kl_align  # type: ignore[import-not-found]

    return attn_kl_align


class AuthorsModels:
    """A frozen teacher and a student with linearly scaled RoPE in bf16, as their script makes them.

    Args:
        kernel: as ``load_kernel`` returns it.
        shape: a name in ``SHAPES``.
        window: the native window, which is the length of a block.
        lora_rank: the rank of LoRA on q, k and v; None to train the weights of q, k and v.
    """

    def __init__(
        self,
        kernel: Callable,
        shape: str,
        window: int,
        device: torch.device,
        lora_rank: int | None = None,
    ):
        from transformers import LlamaConfig, LlamaForCausalLM

        self._kernel, self._recorded = kernel, {}
        _register_attention(self._recorded)
        config = random_config(shape, window)
        rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": config["rope_theta"]}
        options = {"attn_implementation": _ATTENTION, "use_cache": False}
        torch.manual_seed(0)
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            self.teacher = LlamaForCausalLM(LlamaConfig(**config, **options))
            self.student = LlamaForCausalLM(LlamaConfig(**config, **options, rope_parameters=rope))
            torch.set_default_dtype(torch.float32)
        self.student.load_state_dict(self.teacher.state_dict())
        self.teacher.requires_grad_(False).eval()
        self._scale = self.teacher.config.head_dim**-0.5
        self._train(lora_rank)

    def _train(self, lora_rank: int | None) -> None:
        """Choose what is trained, with activation checkpointing, as their script does."""
        self.student.requires_grad_(False).train()
        if lora_rank is None:
            for name, parameter in self.student.named_parameters():
                parameter.requires_grad_(any(f"{p}_proj" in name for p in "qkv"))
        else:
            from peft import LoraConfig, get_peft_model

            targets = ["q_proj", "k_proj", "v_proj"]
            lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=targets)
            self.student = get_peft_model(self.student, lora)
        model = self.student.base_model.model if lora_rank is not None else self.student
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {n: p for n, p in self.student.named_parameters() if p.requires_grad}

    def loss(self, tokens_bs: torch.Tensor) -> torch.Tensor:
        """Return the mean over layers of the sum of the relations of q, k and v."""
        mask = torch.ones_like(tokens_bs)
        self._recorded.clear()
        options = {"attention_mask": mask, "use_cache": False, "logits_to_keep": _LOGITS}
        with torch.no_grad():
            self.teacher(tokens_bs, mode="teacher", **options)
        self.student(tokens_bs, mode="student", **options)
        layers = self.teacher.config.num_hidden_layers
        total = tokens_bs.new_zeros((), dtype=torch.float32)
        for layer in range(layers):
            student, teacher = (self._recorded[mode, layer] for mode in ("student", "teacher"))
            count = mask.sum() * student[0].shape[1]
            for x, y in zip(student, teacher, strict=True):
                total = total + self._relation(x, y, mask) / count
        return total / layers

    def _relation(self, x, y, mask) -> torch.Tensor:
        scales = {"sm_scale_s": self._scale, "sm_scale_t": self._scale}
        return self._kernel(x, x, y, y, attn_mask=mask, causal=True, **scales)


def _register_attention(recorded: dict) -> None:
    """Let transformers' attention keep q, k and v of each layer in ``recorded``."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def record(module, query, key, value, attention_mask=None, mode=None, **options):
        output = sdpa_attention_forward(module, query, key, value, None, is_causal=True, **options)
        if mode is not None:
            recorded[mode, module.layer_idx] = (
                query.contiguous(),
                key.contiguous(),
                value.contiguous(),
            )
        return output[0], None

    AttentionInterface.register(_ATTENTION, record)
