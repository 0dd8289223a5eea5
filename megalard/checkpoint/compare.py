"""Are two models the same? Their tensors bit for bit, and their logits on real tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megalard.checkpoint.build import load_decoder
from megalard.checkpoint.open import Model
from megalard.checkpoint.weights import BLOCK_ELEMENTS
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
    first, count, largest = 0, 0, 0.0
    for start in range(0, x.numel(), BLOCK_ELEMENTS):
        a, b = (t.reshape(-1)[start : start + BLOCK_ELEMENTS] for t in (x, y))
        part = slice(start * x.element_size(), (start + len(a)) * x.element_size())
        differ = (bytes_x[part] != bytes_y[part]).view(-1, x.element_size()).any(1)
        found = int(differ.sum())
        if not found:
            continue
        first = first if count else start + int(differ.to(torch.uint8).argmax())
        count += found
        gap = (a[differ].double() - b[differ].double()).abs().nan_to_num(float("inf")).max()
        largest = max(largest, float(gap))
    index = [int(i) for i in np.unravel_index(first, tuple(x.shape))]
    one, other = (float(t.reshape(-1)[first]) for t in (x, y))
    return (
        f"{count} of {x.numel()} elements differ, the first at {index} "
        f"({one!r} and {other!r}), at most by {largest:.3g}"
    )


@dataclass(frozen=True)
class LogitsDifference:
    """Over the tokens read; ``relative`` is |a - b| / |a| by norm, ``kl`` mean KL(a || b)."""

    tokens: int
    relative: float
    largest: float
    kl: float
    agreement: float


def read_tokens(models: Sequence[Model], text: Path, count: int) -> torch.Tensor:
    """The first tokens of a text file in the first tokenizer that the models have, int64 [count].

    Raises:
        UserError: there is no tokenizer, no text, it has ids that a model does not know, or the
            models' vocabularies differ, so that their logits cannot be compared.
    """
    if count < 1:
        raise UserError(f"{count} tokens are nothing to compare logits on: give 1 or more")
    sizes = {model.spec.vocab_size for model in models}
    if len(sizes) > 1:
        each = " and ".join(f"{model.directory} has {model.spec.vocab_size}" for model in models)
        raise UserError(
            f"logits over different vocabularies cannot be compared ({each} entries): compare the "
            "tensors alone"
        )
    tokenizer = load_tokenizer(_tokenizer_folder(models))
    ids: list[int] = []
    for document in read_documents([text], "text", lambda size: None):
        ids += tokenizer.encode_batch([document])[0]
        if len(ids) >= count:
            break
    if len(ids) < 2:
        raise UserError(f"{text} has {len(ids)} tokens: give a longer text")
    if max(ids) >= min(sizes):
        raise UserError(
            f"{text} has the token {max(ids)} in the tokenizer of {_tokenizer_folder(models)}, but "
            f"the models have {min(sizes)} entries: give a text without it, or another tokenizer"
        )
    return torch.tensor(ids[:count])


def _tokenizer_folder(models: Sequence[Model]) -> Path:
    """Of the first model that has a tokenizer, itself or in its base; else the first model's."""
    for model in models:
        for folder in (model, model.base):
            names = [path.name for path in folder.companions] if folder else []
            if "tokenizer.json" in names or "tokenizer.model" in names:
                return folder.directory
    return models[0].directory


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
