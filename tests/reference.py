"""The plain reference: one process, transformers' own models in float64, dense autograd.

Nothing of megalard's model, parallelism, kernels or step is used here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import AttentionInterface, AutoModelForCausalLM

_captured: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
_allowed: list[torch.Tensor] = []


def _capture(module, query, key, value, attention_mask, scaling, **options):
    """Dense attention that notes q, k, v; the document mask comes from ``_allowed``."""
    _captured.append((query, key, value))
    groups = query.shape[1] // key.shape[1]
    allowed = _allowed[-1]
    window = options.get("sliding_window")
    if window is not None:
        i = torch.arange(allowed.shape[-1])
        allowed = allowed & (i[:, None] - i[None, :] < window)
    k, v = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query @ k.transpose(-1, -2)) * scaling
    scores = scores.masked_fill(~allowed[:, None], -math.inf)
    weights = torch.nan_to_num(scores.softmax(-1))  # a padding row sees nothing
    return (weights @ v).transpose(1, 2), None


AttentionInterface.register("megalard_reference", _capture)


@dataclass
class ReferenceBatch:
    """tokens, positions and document ids [b, s]; negative ids are padding."""

    tokens: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor

    def allowed(self) -> torch.Tensor:
        ids = self.documents
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        return (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None] & causal


@dataclass
class ReferenceTrainer:
    """LinearARD on two transformers models.

    Args:
        teacher_dir, student_dir: Hugging Face directories; the student's config has scaled RoPE.
        trained: name to float64 leaf; weights by their own name, LoRA by ``<proj>.lora_A``/``_B``.
    """

    teacher_dir: str
    student_dir: str
    relations: dict[str, float]
    trained: dict[str, torch.Tensor]
    layers: list[int] | None = None
    lora_scale: float = 1.0
    logits_kl: float = 0.0
    logits_positions: int | None = None
    parts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        def load(path):
            return AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float64, attn_implementation="megalard_reference"
            )

        self.teacher, self.student = load(self.teacher_dir), load(self.student_dir)
        self.base = {k: v.detach() for k, v in self.student.named_parameters()}

    def weights(self) -> dict[str, torch.Tensor]:
        out = dict(self.base)
        for name, value in self.trained.items():
            if name in out:
                out[name] = value
            elif name.endswith("lora_A"):
                weight = name.removesuffix("lora_A") + "weight"
                low = self.trained[name.removesuffix("A") + "B"] @ value
                out[weight] = out[weight] + self.lora_scale * low
        return out

    def _run(self, model, weights, batch: ReferenceBatch):
        _captured.clear()
        _allowed[:] = [batch.allowed()]
        inputs = {"input_ids": batch.tokens, "position_ids": batch.positions, "use_cache": False}
        logits = functional_call(model, weights, kwargs=inputs).logits
        return logits, list(_captured)

    def loss(self, batches: list[ReferenceBatch]) -> torch.Tensor:
        """The loss of one step over all its blocks."""
        totals = {name: torch.zeros((), dtype=torch.float64) for name in self.relations}
        valid = sum(int((b.documents >= 0).sum()) for b in batches)
        logits_sum, logits_count = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            with torch.no_grad():
                logits_t, qkv_t = self._run(self.teacher, {}, batch)
            logits_s, qkv_s = self._run(self.student, self.weights(), batch)
            layers = self.layers or range(len(qkv_s))
            for layer in layers:
                for name in self.relations:
                    kl = _relation_kl(name, qkv_s[layer], qkv_t[layer], batch.allowed())
                    totals[name] = totals[name] + kl.mean(1).sum() / (len(layers) * valid)
            chosen = _last_valid(batch.documents >= 0, self.logits_positions)
            kl = F.kl_div(
                logits_s.log_softmax(-1),
                logits_t.log_softmax(-1),
                log_target=True,
                reduction="none",
            )
            logits_sum = logits_sum + kl.sum(-1)[chosen].sum()
            logits_count += int(chosen.sum())
        loss = sum(self.relations[name] * total for name, total in totals.items())
        self.parts = {name: float(total.detach()) for name, total in totals.items()}
        if self.logits_kl:
            loss = loss + self.logits_kl * logits_sum / logits_count
            self.parts["logits"] = float(logits_sum.detach() / logits_count)
        return loss


def _relation_kl(name: str, student, teacher, allowed: torch.Tensor) -> torch.Tensor:
    """KL_i [b, H, n] of one relation, from dense float64 scores."""

    def log_softmax(qkv):
        index = {"q": 0, "k": 1, "v": 2}
        rows, columns = (qkv[0], qkv[1]) if name == "qk" else (qkv[index[name]],) * 2
        columns = columns.repeat_interleave(rows.shape[1] // columns.shape[1], dim=1)
        scores = rows @ columns.transpose(-1, -2) / math.sqrt(rows.shape[-1])
        # a finite floor keeps rows without any column free of NaN
        return scores.masked_fill(~allowed[:, None], -1e30).log_softmax(-1)

    log_s, log_t = log_softmax(student), log_softmax(teacher)
    return (log_t.exp() * (log_t - log_s) * allowed[:, None]).sum(-1)


def _last_valid(valid: torch.Tensor, last: int | None) -> torch.Tensor:
    if last is None:
        return valid
    from_end = valid.flip(1).cumsum(1).flip(1)
    return valid & (from_end <= last)
