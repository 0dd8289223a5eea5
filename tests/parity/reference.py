"""The plain reference: one process, the models of transformers in float64, dense autograd.

It uses nothing of megalard's model, parallelism, kernels or step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import AttentionInterface, AutoModelForCausalLM

from megalard.config.objective import ObjectiveConfig

_captured: list[tuple[torch.Tensor, ...]] = []
_allowed: list[torch.Tensor] = []


def _capture(module, query, key, value, attention_mask, scaling, **options):
    """Compute dense attention and note q, k, v and A V; ``_allowed`` has the document mask."""
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
    output = (weights @ v).transpose(1, 2)
    _captured.append((query, key, value, output))
    return output, None


AttentionInterface.register("megalard_reference", _capture)


@dataclass
class ReferenceBatch:
    """Blocks with the document of every token.

    Attributes:
        tokens: int64 [b, s], the token ids.
        positions, student_positions: int64 [b, s], where teacher and student read.
        documents: int64 [b, s], the number of the token's document; negative on padding.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    student_positions: torch.Tensor
    documents: torch.Tensor

    def allowed(self) -> torch.Tensor:
        """Return which token sees which: bool [b, s, s]."""
        ids = self.documents
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        return (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None] & causal


@dataclass
class ReferenceTrainer:
    """LinearARD and the other terms on two models of transformers.

    Attributes:
        teacher_dir, student_dir: Hugging Face directories; the student's config has scaled RoPE.
        streams: name to weight and objective, of which only the numbers are used.
        trained: name to float64 leaf; weights under their names, LoRA under ``<proj>.lora_A`` and
            ``<proj>.lora_B``.
        lora_scale: alpha / rank.
        parts: the unweighted mean of each term in the last call of ``loss``.
        layers: the values of single layers in the last call, by part and layer.
    """

    teacher_dir: str
    student_dir: str
    streams: dict[str, tuple[float, ObjectiveConfig]]
    trained: dict[str, torch.Tensor]
    lora_scale: float = 1.0
    parts: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        def load(path):
            return AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float64, attn_implementation="megalard_reference"
            )

        self.teacher, self.student = load(self.teacher_dir), load(self.student_dir)
        # All of them are differentiable, so that autograd tells what the loss depends on.
        self.base = {k: v.detach().requires_grad_() for k, v in self.student.named_parameters()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the student's weights with what is trained merged into them."""
        out = dict(self.base)
        for name, value in self.trained.items():
            if name in out:
                out[name] = value
            elif name.endswith("lora_A"):
                weight = name.removesuffix("lora_A") + "weight"
                low = self.trained[name.removesuffix("A") + "B"] @ value
                out[weight] = out[weight] + self.lora_scale * low
        return out

    def reached(self) -> set[str]:
        """Return the names of the weights that a loss depended on, after its backward pass."""
        weights = {**self.base, **{k: v for k, v in self.trained.items() if k in self.base}}
        return {name for name, weight in weights.items() if weight.grad is not None}

    def _run(self, model, weights, batch: ReferenceBatch, positions: torch.Tensor):
        """Return logits, hidden states (the last after the final norm), and what was captured."""
        _captured.clear()
        _allowed[:] = [batch.allowed()]
        out = functional_call(
            model,
            weights,
            kwargs={
                "input_ids": batch.tokens,
                "position_ids": positions,
                "use_cache": False,
                "output_hidden_states": True,
            },
        )
        return out.logits, out.hidden_states, list(_captured)

    def loss(self, batches: dict[str, list[ReferenceBatch]]) -> torch.Tensor:
        """Return the loss of one step over all blocks of all streams."""
        self.parts, self.layers, loss = {}, {}, torch.zeros((), dtype=torch.float64)
        for name, (weight, objective) in self.streams.items():
            prefix = f"{name}." if len(self.streams) > 1 else ""
            for term, (factor, mean) in self._terms(objective, batches[name], prefix).items():
                loss = loss + weight * factor * mean
                self.parts[prefix + term] = float(mean.detach())
        return loss

    def _terms(
        self, objective: ObjectiveConfig, batches: list[ReferenceBatch], prefix: str
    ) -> dict:
        """Return each term's weight and its mean over the stream's blocks."""
        weights = {name: getattr(objective.relations, name) for name in ("q", "k", "v", "qk")}
        relations = {name: weight for name, weight in weights.items() if weight}
        sums: dict[str, torch.Tensor | float] = {}
        counts = {"valid": 0, "logits": 0, "targets": 0}

        by_layer: dict[tuple[str, int], float] = {}

        def add(name: str, value: torch.Tensor, layer: int | None = None, layers: int = 1) -> None:
            sums[name] = sums.get(name, 0.0) + value / layers
            if layer is not None:
                before = by_layer.get((name, layer), 0.0)
                by_layer[name, layer] = before + float(value.detach())

        for batch in batches:
            with torch.no_grad():
                logits_t, hidden_t, seen_t = self._run(self.teacher, {}, batch, batch.positions)
            logits_s, hidden_s, seen_s = self._run(
                self.student, self.weights(), batch, batch.student_positions
            )
            valid, layers = batch.documents >= 0, objective.layers or range(len(seen_s))
            for layer in layers:
                for name in relations:
                    kl = _relation_kl(name, seen_s[layer], seen_t[layer], batch.allowed())
                    add(name, kl.mean(1).sum(), layer, len(layers))
                out_s, out_t = seen_s[layer][3][valid], seen_t[layer][3][valid]
                error = (out_s - out_t).square().sum(-1) / out_t.square().sum(-1)
                add("context", error.mean(-1).sum(), layer, len(layers))
            for depth in objective.hidden_depths:
                state = max(1, round(depth * len(seen_s)))
                cosine = F.cosine_similarity(hidden_s[state], hidden_t[state], dim=-1)
                add("hidden", (1 - cosine)[valid].sum(), state - 1)
            chosen = _last_valid(valid, objective.logits_positions)
            log_s, log_t = logits_s.log_softmax(-1), logits_t.log_softmax(-1)
            add("logits", (log_t.exp() * (log_t - log_s)).sum(-1)[chosen].sum())
            same = (batch.documents[:, 1:] == batch.documents[:, :-1]) & valid[:, 1:]
            nll = -log_s[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
            add("lm", nll[same].sum())
            counts["valid"] += int(valid.sum())
            counts["logits"] += int(chosen.sum())
            counts["targets"] += int(same.sum())
        terms = {
            **{name: (weight, "valid") for name, weight in relations.items()},
            "context": (objective.attention_output, "valid"),
            "hidden": (objective.hidden_cosine, "valid"),
            "logits": (objective.logits_kl, "logits"),
            "lm": (objective.language_modelling, "targets"),
        }
        self.layers |= {
            f"{prefix}{name}.{layer}": value / counts["valid"]
            for (name, layer), value in by_layer.items()
            if terms[name][0]
        }
        return {
            name: (weight, sums[name] / counts[of])
            for name, (weight, of) in terms.items()
            if weight
        }


def _relation_kl(name: str, student, teacher, allowed: torch.Tensor) -> torch.Tensor:
    """Return KL_i [b, H, n] of one relation, from dense float64 scores."""

    def log_softmax(qkv):
        index = {"q": 0, "k": 1, "v": 2}
        rows, columns = (qkv[0], qkv[1]) if name == "qk" else (qkv[index[name]],) * 2
        columns = columns.repeat_interleave(rows.shape[1] // columns.shape[1], dim=1)
        scores = rows @ columns.transpose(-1, -2) / math.sqrt(rows.shape[-1])
        # A finite floor keeps rows without any column free of NaN.
        return scores.masked_fill(~allowed[:, None], -1e30).log_softmax(-1)

    log_s, log_t = log_softmax(student), log_softmax(teacher)
    return (log_t.exp() * (log_t - log_s) * allowed[:, None]).sum(-1)


def _last_valid(valid: torch.Tensor, last: int | None) -> torch.Tensor:
    """Return the last ``last`` valid tokens of each row: bool [b, s]."""
    if last is None:
        return valid
    from_end = valid.flip(1).cumsum(1).flip(1)
    return valid & (from_end <= last)
