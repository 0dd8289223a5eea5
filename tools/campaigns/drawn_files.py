"""Store a random model's weights and a tokenizer in the ways that users' directories have."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
State = dict[str, torch.Tensor]


def lay_out_weights(rng: random.Random, folder: Path) -> str:
    """Store the weights of ``model.safetensors`` in another way; return a description of it."""
    state = load_file(folder / SINGLE)
    choice = rng.choice(_LAYOUTS)
    return choice(rng, folder, dict(state))


def _keep_one_file(rng: random.Random, folder: Path, state: State) -> str:
    return "one file"


def _write(folder: Path, name: str, state: State) -> None:
    tensors = {key: value.contiguous().clone() for key, value in state.items()}
    save_file(tensors, folder / name, {"format": "pt"})


def _halves(state: State) -> list[State]:
    names = sorted(state)
    middle = len(names) // 2
    return [{n: state[n] for n in part} for part in (names[:middle], names[middle:])]


def _shards(rng: random.Random, folder: Path, state: State) -> str:
    (folder / SINGLE).unlink()
    _write_shards(folder, state)
    return "two files with an index"


def _write_shards(folder: Path, state: State) -> None:
    weight_map = {}
    for number, part in enumerate(_halves(state), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        _write(folder, name, part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def _stale_index(rng: random.Random, folder: Path, state: State) -> str:
    _write_shards(folder, {name: value + 1 for name, value in state.items()})
    return "one file next to an older index with its shards"


def _without_prefix(rng: random.Random, folder: Path, state: State) -> str:
    _write(folder, SINGLE, {name.removeprefix("model."): value for name, value in state.items()})
    return "names without model."


def _foreign_prefix(rng: random.Random, folder: Path, state: State) -> str:
    prefix = rng.choice(["module.", "_orig_mod.", "base_model.model.", "language_model."])
    _write(folder, SINGLE, {prefix + name: value for name, value in state.items()})
    return f"names with {prefix}"


def _more_tensors(rng: random.Random, folder: Path, state: State) -> str:
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["model.layers.0.self_attn.q_proj.bias_"] = torch.ones(3)
    _write(folder, SINGLE, state)
    return "tensors that belong to nothing"


def _fewer_tensors(rng: random.Random, folder: Path, state: State) -> str:
    name = rng.choice(sorted(state))
    state.pop(name)
    _write(folder, SINGLE, state)
    return f"without {name}"


def _other_shape(rng: random.Random, folder: Path, state: State) -> str:
    name = rng.choice(sorted(state))
    state[name] = torch.cat([state[name], state[name][:1]])
    _write(folder, SINGLE, state)
    return f"{name} one row longer"


def _other_head(rng: random.Random, folder: Path, state: State) -> str:
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + rng.choice([0.0, 0.5])
    if rng.random() < 0.3:
        state.pop("model.embed_tokens.weight")
    _write(folder, SINGLE, state)
    return "a head of its own"


def _named_file(rng: random.Random, folder: Path, state: State) -> str:
    _write(folder, "other.safetensors", {name: value * 0.5 for name, value in state.items()})
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    return "the file that config.json names"


def _half_precision(rng: random.Random, folder: Path, state: State) -> str:
    dtype = rng.choice([torch.bfloat16, torch.float16])
    _write(folder, SINGLE, {name: value.to(dtype) for name, value in state.items()})
    return str(dtype)


def _truncated(rng: random.Random, folder: Path, state: State) -> str:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: rng.randrange(len(content))])
    return "a truncated file"


_LAYOUTS: tuple[Callable[[random.Random, Path, State], str], ...] = (
    _keep_one_file,
    _keep_one_file,
    _keep_one_file,
    _shards,
    _stale_index,
    _without_prefix,
    _foreign_prefix,
    _more_tensors,
    _fewer_tensors,
    _other_shape,
    _other_head,
    _named_file,
    _half_precision,
    _truncated,
)


def lay_out_tokenizer(rng: random.Random, folder: Path, stock: Path) -> str:
    """Copy one of the tokenizers of a stock folder; return its name."""
    source = rng.choice(sorted(stock.iterdir()))
    for file in source.iterdir():
        shutil.copy(file, folder / file.name)
    return source.name
