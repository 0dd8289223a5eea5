"""Pre-trains the quickstart's teacher from scratch on the Python standard library.

    python tools/quickstart/pretrain_teacher.py --output launch/quickstart_teacher

A Llama-shaped model of 0.8M parameters with a native context of 256 tokens and a byte-level BPE of
512 pieces, trained with plain transformers and torch on 41M tokens, ten epochs: half an hour on two
CPU cores; a GPU is used when there is one. The defaults, with Python 3.11's library, made the
teacher kept in the repository. The text comes from ``stdlib_text.py``.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.quickstart import stdlib_text
from tools.quickstart.byte_bpe import save_tokenizer, train_tokenizer

CONTEXT_LENGTH = 256
VOCAB_SIZE = 512
ROPE_THETA = 10000.0
EVAL_LENGTHS = (64, 128, 256)
# Above this the weights are saved in bfloat16, which keeps the folder under 4 MB.
MAX_FP32_BYTES = 3_600_000


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one int64 stream ``[n]``, each followed by the end-of-document token."""
    pieces = []
    for text in texts:
        pieces += tokenizer.backend_tokenizer.encode(text).ids
        pieces.append(tokenizer.eos_token_id)
    return torch.tensor(pieces)


def model_config(eos_id: int) -> LlamaConfig:
    """The teacher's shape."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=None,
        # Rows this short compile into faster code than SDPA's on a CPU: 52k against 36k tokens/s.
        attn_implementation="eager",
    )


def next_token_loss(model: LlamaForCausalLM, rows_bs: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats a token) of rows of s + 1 tokens ``[b, s + 1]``, a scalar."""
    logits_bsv = model(input_ids=rows_bs[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_bsv.float().flatten(0, 1), rows_bs[:, 1:].flatten()
    )


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, stream: torch.Tensor, length: int, max_rows: int | None = None
) -> float:
    """Mean loss over the stream cut into rows of ``length`` predictions, each read alone."""
    device = next(model.parameters()).device
    count = (len(stream) - 1) // length
    starts = torch.arange(count)[: max_rows or count] * length
    total = 0.0
    for chunk in starts.split(16384 // length):
        rows_bs = stream[chunk[:, None] + torch.arange(length + 1)].to(device)
        total += next_token_loss(model, rows_bs).item() * len(chunk)
    return total / len(starts)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up from the first step, then a cosine to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, streams: dict[str, torch.Tensor], args) -> None:
    """Trains in place; every step reads ``args.batch`` random windows of the train stream."""
    device = next(model.parameters()).device
    stream = streams["train"]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    rng = np.random.default_rng(args.seed)
    loss_of = torch.compile(next_token_loss) if args.compile else next_token_loss
    began, losses = time.perf_counter(), []
    window = torch.arange(CONTEXT_LENGTH + 1)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        starts = torch.from_numpy(rng.integers(0, len(stream) - CONTEXT_LENGTH, args.batch))
        rows_bs = stream[starts[:, None] + window].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, rows_bs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            seconds = time.perf_counter() - began
            tokens = (step + 1) * args.batch * CONTEXT_LENGTH
            print(
                f"step {step + 1:5d}/{args.steps}  train {np.mean(losses):.4f}  "
                f"validation {evaluate(model, streams['validation'], CONTEXT_LENGTH, 128):.4f}  "
                f"heldout {evaluate(model, streams['heldout'], CONTEXT_LENGTH, 128):.4f}  "
                f"{tokens / 1e6:.1f}M tokens  {tokens / seconds:.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
            losses = []


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes a Hugging Face folder that transformers 4 and 5 read alike."""
    size = 4 * sum(p.numel() for p in model.parameters())
    dtype = torch.float32 if size <= MAX_FP32_BYTES else torch.bfloat16
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.to(device="cpu", dtype=dtype).save_pretrained(output)
    save_tokenizer(tokenizer, output)

    # transformers 4 reads the old spellings.
    config = json.loads((output / "config.json").read_text())
    dtype_name = str(dtype).removeprefix("torch.")
    config.update(
        rope_theta=ROPE_THETA,
        rope_scaling=None,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        dtype=dtype_name,
        torch_dtype=dtype_name,
    )
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def report(output: Path, heldout: torch.Tensor, device: str) -> None:
    """Held-out loss of the saved folder by length, natively and with positions divided by 8."""
    scaled = LlamaConfig.from_pretrained(output)
    scaled.rope_parameters = {"rope_type": "linear", "factor": 8.0, "rope_theta": ROPE_THETA}
    for name, config in (("native", None), ("positions / 8", scaled)):
        model = LlamaForCausalLM.from_pretrained(output, config=config).float().to(device).eval()
        losses = (f"{length}: {evaluate(model, heldout, length):.4f}" for length in EVAL_LENGTHS)
        print(f"held-out loss by length, {name:>13}:  {'   '.join(losses)}")
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"{output}: {size} bytes")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32, help="rows of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps of warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=200, metavar="STEPS")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the training step; needs a C++ compiler and doubles the speed",
    )
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    texts = {
        split: [document["text"] for document in documents]
        for split, documents in stdlib_text.collect().items()
    }
    tokenizer = train_tokenizer(texts["train"], VOCAB_SIZE, CONTEXT_LENGTH)
    streams = {split: encode(tokenizer, documents) for split, documents in texts.items()}
    sizes = ", ".join(f"{split} {len(stream)}" for split, stream in streams.items())
    model = LlamaForCausalLM(model_config(tokenizer.eos_token_id)).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters on {device}; tokens: {sizes}", flush=True)

    train(model, streams, args)
    args.output.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, args.output)
    report(args.output, streams["heldout"], device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
