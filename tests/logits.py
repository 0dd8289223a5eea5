"""Logits of a model directory, by megalard's decoder and by transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megalard.checkpoint.build import load_decoder
from megalard.checkpoint.open import open_model
from megalard.data.batch import collate
from megalard.model.decoder import Decoder
from megalard.model.parameter_slice import ParameterSlice
from megalard.model.rope import rope_table
from megalard.parallel.mesh import SINGLE, Axis
from megalard.training.export import gather_full

# The rounding of fp32 (6e-8) through three layers, against float64. Observed at most 9e-7. A wrong
# flag, frequency or window changes the logits by 1 % or more.
FP32_TOLERANCE = 1e-5


def random_tokens(batch: int, length: int, vocab: int = 67) -> torch.Tensor:
    """Return random token ids, int64 [batch, length], the same for the same arguments."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(length))


def load(directory: str | Path, axis: Axis = SINGLE) -> Decoder:
    """Load the decoder of a directory in fp32, as the trainer loads a teacher."""
    model = open_model(directory)
    table = rope_table(model.spec)
    device = torch.device("cpu")
    return load_decoder(model.spec, table, axis, model.weights, device, torch.float32)


@torch.no_grad()
def decoder_logits(decoder: Decoder, token_bs: torch.Tensor) -> torch.Tensor:
    """Return logits [b, s, vocab]; a collective call of the ranks that share the decoder."""
    batch, length = token_bs.shape
    blocks = collate([(row.numpy(), [(0, length)]) for row in token_bs])
    local = decoder.logits(decoder(blocks, torch.float32)).T
    start, vocab = decoder.first_vocab_row, decoder.spec.vocab_size
    held = ParameterSlice((vocab, batch * length), 0, start, local.shape[0], 1)
    return gather_full(local, held, decoder.ops.axis).T.reshape(batch, length, vocab)


@torch.no_grad()
def transformers_logits(directory: str | Path, token_bs: torch.Tensor) -> torch.Tensor:
    """Return the logits of transformers in float64, [b, s, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    return model(token_bs, use_cache=False).logits


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |actual - expected| / |expected|, by norm, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare logits with those of transformers."""
    assert actual.shape == expected.shape
    error = relative_error(actual, expected)
    assert error < FP32_TOLERANCE, f"logits are off by {error:.2e} of their norm"
