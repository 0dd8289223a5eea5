"""Tensors that the files store under other names than the decoder, or several in one.

The files of some families hold one tensor for q, k and v and one for gate and up. Files that were
saved from a model without its head lack the prefix ``model.``. transformers reads both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megalard.checkpoint.build import full_slices
from megalard.checkpoint.weights import Weights, no_tensor
from megalard.errors import UserError
from megalard.model.families import FAMILIES
from megalard.model.parameter_slice import ParameterSlice
from megalard.model.spec import ModelSpec

_PREFIX = "model."


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in the files: some rows of a stored tensor, or all of it."""

    stored: str
    start: int = 0
    rows: int | None = None


class RenamedWeights:
    """A view of stored tensors under the names of the decoder.

    Args:
        files: the tensors under the names of the files.
        places: the decoder's name of each tensor to its place in the files.
    """

    def __init__(self, files: Weights, places: dict[str, _Place]):
        self._files, self._places = files, places
        self.directory: Path = files.directory

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._place(name)
        shape = self._files.shape(place.stored)
        return shape if place.rows is None else (place.rows, *shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        return self._files.dtype(self._place(name).stored)

    def files(self) -> list[Path]:
        return self._files.files()

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        """Return the tensor, or a slice of it, in the dtype of the file."""
        place = self._place(name)
        if place.rows is None:
            return self._files.read(place.stored, held)
        start, length = place.start, place.rows
        if held is not None and held.dim == 0:
            start, length = start + held.start, held.length
        stored = ParameterSlice(self._files.shape(place.stored), 0, start, length, 1)
        tensor = self._files.read(place.stored, stored)
        return tensor if held is None or held.dim in (None, 0) else held.cut(tensor)

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise no_tensor(name, self)
        return self._places[name]


def under_our_names(files: Weights, spec: ModelSpec) -> Weights:
    """Return the tensors of a model or an adapter under the names of the decoder.

    Raises:
        UserError: the files hold a tensor twice, or a stored tensor does not have as many rows as
            the tensors that it holds.
    """
    slices = full_slices(spec)
    places: dict[str, _Place] = {}
    for stored in files.names():
        name = _with_prefix(stored, slices, spec)
        for part, place in _parts(stored, name, files, slices, spec).items():
            if part in places:
                raise UserError(
                    f"tensor {part} is stored twice in {files.directory}, in {places[part].stored} "
                    f"and {stored}: remove the one that does not belong there"
                )
            places[part] = place
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if spec.tied_embeddings and embedding not in places and head in places:
        places[embedding] = places.pop(head)
    if all(name == place.stored for name, place in places.items()):
        return files
    return RenamedWeights(files, places)


def _with_prefix(stored: str, slices: dict[str, ParameterSlice], spec: ModelSpec) -> str:
    """Return a tensor's name in a model with a head; transformers changes the prefix likewise."""

    def is_known(name: str) -> bool:
        head, _, kind = name.rpartition(".")
        module = name if kind in ("weight", "bias") else f"{head}.weight"
        parts = _fused_parts(name, spec)
        return module in slices or (parts is not None and parts[0] in slices)

    if not is_known(stored):
        for name in (_PREFIX + stored, stored.removeprefix(_PREFIX)):
            if is_known(name):
                return name
    return stored


def _fused_parts(name: str, spec: ModelSpec) -> tuple[str, ...] | None:
    """Return the decoder's weights that a stored tensor holds together; None for other tensors."""
    stem, _, kind = name.rpartition(".")
    if kind in ("lora_A", "lora_B"):
        name = f"{stem}.weight"
    for stored, parts in FAMILIES[spec.family].fused.items():
        if name.endswith(f".{stored}"):
            prefix = name.removesuffix(stored)
            return tuple(prefix + part for part in parts)
    return None


def _parts(
    stored: str, name: str, files: Weights, slices: dict[str, ParameterSlice], spec: ModelSpec
) -> dict[str, _Place]:
    """Return the places of the tensors that one stored tensor holds."""
    weights = _fused_parts(name, spec)
    if weights is None or any(weight not in slices for weight in weights):
        return {name: _Place(stored)}
    kind = name.rpartition(".")[2]
    parts, start = {}, 0
    for weight in weights:
        rows = slices[weight].full_shape[0]
        part = f"{weight.removesuffix('weight')}{kind}"
        # A LoRA pair of the stored tensor is one A for all parts, and some rows of B for each.
        parts[part] = _Place(stored) if kind == "lora_A" else _Place(stored, start, rows)
        start += rows
    shape = files.shape(stored)
    if kind != "lora_A" and shape[0] != start:
        raise UserError(
            f"tensor {stored} in {files.directory} has shape {list(shape)}, but config.json "
            f"implies {start} rows: the files do not belong together"
        )
    return parts


class StoredWeights:
    """The tensors of a model under the names of its family's files, for writing them.

    Attributes:
        parts: name in the files to the decoder's names of the tensors that it holds, in order.
    """

    def __init__(self, weights: Weights, spec: ModelSpec):
        self._weights, self.directory = weights, weights.directory
        parts_of = {
            f"model.layers.{layer}.{stored}": [f"model.layers.{layer}.{part}" for part in parts]
            for layer in range(spec.num_layers)
            for stored, parts in FAMILIES[spec.family].fused.items()
        }
        stored_of = {part: stored for stored, parts in parts_of.items() for part in parts}
        stored_names = dict.fromkeys(stored_of.get(name, name) for name in weights.names())
        self.parts = {name: parts_of.get(name, [name]) for name in stored_names}

    def names(self) -> list[str]:
        return list(self.parts)

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [self._weights.shape(part) for part in self.parts[name]]
        return shapes[0] if len(shapes) == 1 else (sum(s[0] for s in shapes), *shapes[0][1:])

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(self.parts[name][0])

    def files(self) -> list[Path]:
        return self._weights.files()

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        """Return the full tensor."""
        assert held is None, "models are written as full tensors"
        tensors = [self._weights.read(part) for part in self.parts[name]]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class _StoredPairs:
    """LoRA pairs of tensors that the files hold as one, as pairs of the stored tensor.

    The stored tensor's A stacks the A's of its parts, and its B has the B's of its parts as blocks
    on the diagonal. All stored pairs have the same rank; smaller ones are filled up with zeros.
    """

    def __init__(self, pairs: Weights, modules: dict[str, list[str]], spec: ModelSpec, rank: int):
        self._pairs, self._modules, self._rank = pairs, modules, rank
        self._slices, self.directory = full_slices(spec), pairs.directory
        self.rank = rank * max(map(len, modules.values()))

    def names(self) -> list[str]:
        return [f"{module}.{kind}" for module in self._modules for kind in ("lora_A", "lora_B")]

    def shape(self, name: str) -> tuple[int, ...]:
        parts, is_a = self._parts(name)
        shapes = [self._slices[f"{part}.weight"].full_shape for part in parts]
        return (self.rank, shapes[0][1]) if is_a else (sum(s[0] for s in shapes), self.rank)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def files(self) -> list[Path]:
        return self._pairs.files()

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        """Return the full tensor."""
        assert held is None, "adapters are written as full tensors"
        full, row = torch.zeros(self.shape(name)), 0
        parts, is_a = self._parts(name)
        for number, part in enumerate(parts):
            rows = self._slices[f"{part}.weight"].full_shape[0]
            place = slice(number * self._rank, (number + 1) * self._rank)
            kind = "lora_A" if is_a else "lora_B"
            if f"{part}.{kind}" in self._pairs.names():
                value = self._pairs.read(f"{part}.{kind}").float()
                if is_a:
                    full[place] = value
                else:
                    full[row : row + rows, place] = value
            row += rows
        return full

    def _parts(self, name: str) -> tuple[list[str], bool]:
        module, _, kind = name.rpartition(".")
        return self._modules[module], kind == "lora_A"


def stored_pairs(pairs: Weights, trained: dict, spec: ModelSpec) -> tuple[Weights, dict]:
    """Return a run's LoRA pairs under the names of its family's files, for a PEFT adapter.

    Args:
        pairs: the pairs under the names of the decoder.
        trained: the section ``trained`` of the manifest.

    Returns:
        The pairs, and the section with the rank and alpha that the pairs have.
    """
    if not FAMILIES[spec.family].fused:
        return pairs, trained
    modules: dict[str, list[str]] = {}
    for name in pairs.names():
        part = name.rpartition(".")[0]
        stored, parts = _stored_module(part, spec)
        modules[stored] = parts
    lora = trained["lora"]
    stored_view = _StoredPairs(pairs, modules, spec, lora["rank"])
    alpha = lora["alpha"] * stored_view.rank / lora["rank"]
    return stored_view, {**trained, "lora": {**lora, "rank": stored_view.rank, "alpha": alpha}}


def _stored_module(module: str, spec: ModelSpec) -> tuple[str, list[str]]:
    """Return the stored module that holds a module of the decoder, and all modules in it."""
    for stored, parts in FAMILIES[spec.family].fused.items():
        for part in parts:
            if module.endswith(end := part.removesuffix(".weight")):
                prefix = module.removesuffix(end)
                names = [prefix + other.removesuffix(".weight") for other in parts]
                return prefix + stored.removesuffix(".weight"), names
    return module, [module]
