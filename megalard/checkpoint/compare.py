"""Are two models the same? Their tensors bit for bit, and their logits on real tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megalard.checkpoint.load import load_decoder
from megalard.checkpoint.source import Model
from megalard.data.batch import collate
from megalard.data.sources import read_documents
from megalard.data.tokenizer import load_tokenizer
from megalard.errors import UserError
from megalard.model.rope import rope_table
from megalard.parallel.mesh import SINGLE


def tensor_differences(
    a: Model, b: Model, progress: Callable[[int], None] = lambda count: None
) -> list[str]:
    """One line for every tensor that is not the same in both; two tensors are held at a time."""
    first, second = a.weights, b.weights
    names_a, names_b = set(first.names()), set(second.names())
    lines = [f"{name}: only in {a.directory}" for name in sorted(names_a - names_b)]
    lines += [f"{name}: only in {b.directory}" for name in sorted(names_b - names_a)]
    for name in first.names():
        if name not in names_b:
            continue
        shapes = [list(weights.shape(name)) for weights in (first, second)]
        dtypes = [str(weights.dtype(name)).removeprefix("torch.") for weights in (first, second)]
        if shapes[0] != shapes[1]:
            lines.append(f"{name}: shape {shapes[0]} and {shapes[1]}")
        elif dtypes[0] != dtypes[1]:
            lines.append(f"{name}: dtype {dtypes[0]} and {dtypes[1]}")
        else:
            line = _first_difference(first.read(name), second.read(name))
            lines += [f"{name}: {line}"] if line else []
        progress(torch.Size(shapes[0]).numel() * first.dtype(name).itemsize)
    return lines


def _first_difference(x: torch.Tensor, y: torch.Tensor) -> str | None:
    if not x.numel():
        return None
    bytes_x, bytes_y = (t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
    if torch.equal(bytes_x, bytes_y):
        return None
    differ = (bytes_x != bytes_y).view(-1, x.element_size()).any(1).view(x.shape)
    index = [int(i) for i in differ.nonzero()[0]]
    largest = (x.double() - y.double()).abs().nan_to_num(float("inf")).max()
    return (
        f"{int(differ.sum())} of {x.numel()} elements differ, the first at {index} "
        f"({float(x[tuple(index)])!r} and {float(y[tuple(index)])!r}), at most by {largest:.3g}"
    )


@dataclass(frozen=True)
class LogitsDifference:
    """Over the tokens read; ``relative`` is |a - b| / |a| by norm, ``kl`` mean KL(a || b)."""

    tokens: int
    relative: float
    largest: float
    kl: float
    agreement: float


def read_tokens(model: Model, text: Path, count: int) -> torch.Tensor:
    """The first tokens of a text file in the model's own tokenizer, int64 [count].

    Raises:
        UserError: there is no tokenizer, or no text.
    """
    folder = model.directory
    if not any(path.name.startswith("tokenizer") for path in model.companions) and model.base:
        folder = model.base.directory
    tokenizer = load_tokenizer(folder)
    ids: list[int] = []
    for document in read_documents([text], "text", lambda size: None):
        ids += tokenizer.encode_batch([document])[0]
        if len(ids) >= count:
            break
    if len(ids) < 2:
        raise UserError(f"{text} has {len(ids)} tokens: give a longer text")
    return torch.tensor(ids[:count])


@torch.no_grad()
def logits_of(model: Model, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 [tokens, vocabulary] by the trainer's decoder with the model's own RoPE."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rope = rope_table(model.spec)
    decoder = load_decoder(model.spec, rope, SINGLE, model.weights, device, dtype)
    batch = collate([(np.asarray(tokens), [(0, len(tokens))])]).to(device)
    return decoder.logits(decoder(batch, dtype)).float().cpu()


def logits_difference(
    a: Model, b: Model, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> LogitsDifference:
    """Compare the logits of two models; one of them is loaded at a time."""
    x, y = logits_of(a, tokens, dtype), logits_of(b, tokens, dtype)
    log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    return LogitsDifference(
        tokens=len(tokens),
        relative=float((x - y).double().norm() / x.double().norm()),
        largest=float((x - y).abs().max()),
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        agreement=float((x.argmax(-1) == y.argmax(-1)).double().mean()),
    )
