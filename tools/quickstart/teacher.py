"""The model of the quickstart's teacher: its shape, its training, its files."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.quickstart.byte_bpe import save_tokenizer

WINDOW = 256
VOCAB_SIZE = 512
_ROPE_THETA = 10000.0
_MEASURED_LENGTHS = (64, 128, 256)
# The number of rows that a loss is measured on during the training.
_MEASURED_ROWS = 128
_TOKENS_PER_PASS = 16384
# The end of the learning rate's cosine, relative to its peak.
_MIN_RATIO = 0.02
# Larger weights are saved in bfloat16, which keeps the directory under 4 MB.
_MAX_FP32_BYTES = 3_600_000


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all texts as one stream, int64 [n], with the end token after each of them."""
    ids = []
    for text in texts:
        ids += tokenizer.backend_tokenizer.encode(text).ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def make_model(eos_id: int) -> LlamaForCausalLM:
    """Return the model with random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=None,
        # On a CPU, compiled eager attention is faster than SDPA for rows this short: 52k tokens/s
        # compared with 36k.
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def next_token_loss(model: LlamaForCausalLM, rows_bs: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats over rows of s + 1 tokens, int64 [b, s + 1]."""
    logits_bsv = model(input_ids=rows_bs[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_bsv.float().flatten(0, 1), rows_bs[:, 1:].flatten()
    )


@torch.no_grad()
def mean_loss(
    model: LlamaForCausalLM, stream: torch.Tensor, length: int, max_rows: int | None = None
) -> float:
    """Return the mean loss over a stream, cut into rows of ``length`` predictions.

    Args:
        max_rows: the largest number of rows to read; all when not given.
    """
    device = next(model.parameters()).device
    count = (len(stream) - 1) // length
    starts = torch.arange(count)[: max_rows or count] * length
    total = 0.0
    for part in starts.split(_TOKENS_PER_PASS // length):
        rows_bs = stream[part[:, None] + torch.arange(length + 1)].to(device)
        total += next_token_loss(model, rows_bs).item() * len(part)
    return total / len(starts)


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: a linear warm-up, then a cosine."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (_MIN_RATIO + (1 - _MIN_RATIO) * cosine)


def train(
    model: LlamaForCausalLM, streams: dict[str, torch.Tensor], options: argparse.Namespace
) -> None:
    """Train in place. Every step reads random windows of the train stream.

    Args:
        streams: split to tokens.
        options: the options of ``tools.quickstart.pretrain_teacher``.
    """
    device = next(model.parameters()).device
    stream = streams["train"]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    rng = np.random.default_rng(options.seed)
    loss_of = torch.compile(next_token_loss) if options.compile else next_token_loss
    start, losses = time.perf_counter(), []
    row = torch.arange(WINDOW + 1)
    for step in range(options.steps):
        rate = learning_rate(step, options.steps, options.learning_rate, options.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        begins = torch.from_numpy(rng.integers(0, len(stream) - WINDOW, options.global_batch))
        rows_bs = stream[begins[:, None] + row].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, rows_bs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % options.log_every == 0 or step + 1 == options.steps:
            seconds = time.perf_counter() - start
            tokens = (step + 1) * options.global_batch * WINDOW
            measured = "  ".join(
                f"{split} {mean_loss(model, streams[split], WINDOW, _MEASURED_ROWS):.4f}"
                for split in ("validation", "heldout")
            )
            print(
                f"step {step + 1:5d}/{options.steps}  train {np.mean(losses):.4f}  {measured}  "
                f"{tokens / 1e6:.1f}M tokens  {tokens / seconds:.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
            losses = []


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write a Hugging Face directory that transformers 4 and 5 read alike."""
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    dtype = torch.float32 if size <= _MAX_FP32_BYTES else torch.bfloat16
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.to(device="cpu", dtype=dtype).save_pretrained(output)
    save_tokenizer(tokenizer, output)

    # transformers 4 reads the old spellings.
    config = json.loads((output / "config.json").read_text())
    dtype_name = str(dtype).removeprefix("torch.")
    config.update(
        rope_theta=_ROPE_THETA,
        rope_scaling=None,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        dtype=dtype_name,
        torch_dtype=dtype_name,
    )
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def print_losses(output: Path, heldout: torch.Tensor, device: torch.device) -> None:
    """Print the held-out loss of a saved model by length, natively and with scaled positions."""
    scaled = LlamaConfig.from_pretrained(output)
    scaled.rope_parameters = {"rope_type": "linear", "factor": 8.0, "rope_theta": _ROPE_THETA}
    for name, config in (("native", None), ("positions / 8", scaled)):
        model = LlamaForCausalLM.from_pretrained(output, config=config).float().to(device).eval()
        losses = (f"{n}: {mean_loss(model, heldout, n):.4f}" for n in _MEASURED_LENGTHS)
        print(f"held-out loss by length, {name:>13}:  {'   '.join(losses)}")
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"{output}: {size} bytes")
