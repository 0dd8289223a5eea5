"""Compare two models: their tensors bit for bit, and their logits on real tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megalard.checkpoint.build import load_decoder
from megalard.checkpoint.open import StoredModel
from megalard.checkpoint.weights import BLOCK_ELEMENTS, dtype_name
from megalard.data.batch import collate
from megalard.data.sources import read_documents
from megalard.errors import UserError
from megalard.files.writing import Progress, no_progress
from megalard.model.rope import rope_table
from megalard.parallel.mesh import SINGLE


def tensor_differences(
    a: StoredModel, b: StoredModel, progress: Progress = no_progress
) -> list[str]:
    """Return one line for every tensor that differs. Two tensors are in memory at a time."""
    weights_a, weights_b = a.weights, b.weights
    names_a, names_b = set(weights_a.names()), set(weights_b.names())
    lines = [f"{name}: only in {a.directory}" for name in sorted(names_a - names_b)]
    lines += [f"{name}: only in {b.directory}" for name in sorted(names_b - names_a)]
    for name in weights_a.names():
        if name not in names_b:
            continue
        both = (weights_a, weights_b)
        shapes = [list(weights.shape(name)) for weights in both]
        dtypes = [dtype_name(weights.dtype(name)) for weights in both]
        if shapes[0] != shapes[1]:
            lines.append(f"{name}: shape {shapes[0]} and {shapes[1]}")
        elif dtypes[0] != dtypes[1]:
            lines.append(f"{name}: dtype {dtypes[0]} and {dtypes[1]}")
        else:
            line = _difference(weights_a.read(name), weights_b.read(name))
            lines += [f"{name}: {line}"] if line else []
        progress(torch.Size(shapes[0]).numel() * weights_a.dtype(name).itemsize)
    return lines


def _difference(x: torch.Tensor, y: torch.Tensor) -> str | None:
    """Describe how two tensors of the same shape and dtype differ; None if every bit is equal."""
    if not x.numel():
        return None
    bytes_x, bytes_y = (t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
    if torch.equal(bytes_x, bytes_y):
        return None
    first_index, count, largest_gap = 0, 0, 0.0
    for start in range(0, x.numel(), BLOCK_ELEMENTS):
        a, b = (t.reshape(-1)[start : start + BLOCK_ELEMENTS] for t in (x, y))
        part = slice(start * x.element_size(), (start + len(a)) * x.element_size())
        differs = (bytes_x[part] != bytes_y[part]).view(-1, x.element_size()).any(1)
        block_count = int(differs.sum())
        if not block_count:
            continue
        if not count:
            first_index = start + int(differs.to(torch.uint8).argmax())
        count += block_count
        gap = (a[differs].double() - b[differs].double()).abs().nan_to_num(float("inf")).max()
        largest_gap = max(largest_gap, float(gap))
    index = [int(i) for i in np.unravel_index(first_index, tuple(x.shape))]
    value_x, value_y = (float(t.reshape(-1)[first_index]) for t in (x, y))
    return (
        f"{count} of {x.numel()} elements differ, the first at {index} "
        f"({value_x!r} and {value_y!r}), at most by {largest_gap:.3g}"
    )


@dataclass(frozen=True)
class LogitsDifference:
    """How the logits of two models a and b differ.

    Attributes:
        tokens: the number of tokens that were read.
        relative: the L2 norm of a - b, divided by that of a.
        largest: the largest absolute difference.
        kl: the mean of KL(a || b) over the tokens, in nats.
        agreement: the share of tokens with the same largest logit.
    """

    tokens: int
    relative: float
    largest: float
    kl: float
    agreement: float


def read_tokens(models: Sequence[StoredModel], text: Path, count: int) -> torch.Tensor:
    """Return the first tokens of a text file, int64 [count or fewer].

    The tokenizer is that of the first model that has one, in its directory or in its base.

    Raises:
        UserError: there is no tokenizer or no text, the text has ids that a model does not have, or
            the vocabularies of the models differ in size, so that logits cannot be compared.
    """
    if count < 1:
        raise UserError(f"{count} tokens are too few to compare logits on: give 1 or more")
    sizes = {model.spec.vocab_size for model in models}
    if len(sizes) > 1:
        each = " and ".join(f"{model.directory} has {model.spec.vocab_size}" for model in models)
        raise UserError(
            f"logits over different vocabularies cannot be compared ({each} entries): compare the "
            "tensors alone"
        )
    reader = next((model for model in models if model.finds_tokenizer), models[0])
    ids: list[int] = []
    for document in read_documents([text]):
        ids += reader.tokenizer.encode_batch([document])[0]
        if len(ids) >= count:
            break
    if len(ids) < 2:
        raise UserError(f"{text} has {len(ids)} tokens: give a longer text")
    if max(ids) >= min(sizes):
        raise UserError(
            f"{text} has the token {max(ids)} in the tokenizer of {reader.tokenizer_directory}, "
            f"but the models have {min(sizes)} entries: give another text, or another tokenizer"
        )
    return torch.tensor(ids[:count])


@torch.no_grad()
def logits_of(model: StoredModel, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the logits of the trainer's decoder, with the model's RoPE: fp32 [tokens, vocab]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rope = rope_table(model.spec)
    decoder = load_decoder(model.spec, rope, SINGLE, model.weights, device, dtype)
    batch = collate([(np.asarray(tokens), [(0, len(tokens))])]).to(device)
    return decoder.logits(decoder(batch, dtype)).float().cpu()


def logits_difference(
    a: StoredModel, b: StoredModel, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> LogitsDifference:
    """Compare the logits of two models. One model is in memory at a time."""
    x, y = logits_of(a, tokens, dtype), logits_of(b, tokens, dtype)
    log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    return LogitsDifference(
        tokens=len(tokens),
        relative=float((x - y).double().norm() / x.double().norm()),
        largest=float((x - y).abs().max()),
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        agreement=float((x.argmax(-1) == y.argmax(-1)).double().mean()),
    )
