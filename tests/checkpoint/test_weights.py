"""Merged weights: LoRA in blocks of rows with the bits of one product, and trained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalard.checkpoint import weights as weights_module
from megalard.checkpoint.weights import (
    MergedWeights,
    check_trained,
    is_finite,
    merge_lora,
    size_of,
    trained_parts,
)
from megalard.model.parameter_slice import ParameterSlice
from tests.command_line import user_error


def one_product(original, lora_a, lora_b, scale):
    """Return W + scale B A, computed in one product."""
    return (lora_b @ lora_a * scale + original.float()).to(original.dtype)


def matrices(rows: int, columns: int, rank: int):
    """Return a random W, A and B."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, columns), (rank, columns), (rows, rank))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(1, 1000, 4), (129, 1001, 1), (1003, 257, 6), (777, 333, 17), (1499, 16, 3), (900, 5, 4)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_blocks_have_the_bits_of_one_product(rows, columns, rank, dtype, monkeypatch):
    monkeypatch.setattr(weights_module, "BLOCK_ELEMENTS", 10_000)
    original, lora_a, lora_b = matrices(rows, columns, rank)
    original = original.to(dtype)
    expected = one_product(original.clone(), lora_a, lora_b, 1.7)
    merged = merge_lora("w", original, lora_a, lora_b, 1.7)
    assert merged.dtype == dtype and torch.equal(merged, expected)


class LargestNewTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation allocates."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


def test_a_merge_takes_one_block_in_addition_to_the_weight():
    original, lora_a, lora_b = matrices(3001, 4099, 8)
    original = original.bfloat16()
    with LargestNewTensor() as largest:
        merged = merge_lora("w", original, lora_a, lora_b, 0.5)
    assert merged.data_ptr() == original.data_ptr()
    assert 0 < largest.nbytes <= 4 * weights_module.BLOCK_ELEMENTS < original.nbytes


class Tensors:
    """Weights in memory."""

    def __init__(self, directory: str, **tensors: torch.Tensor):
        self.directory = Path(directory)
        self.tensors = {name.replace("__", "."): value for name, value in tensors.items()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def files(self) -> list[Path]:
        return [self.directory / "file"]

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        value = self.tensors[name].clone()
        return value if held is None else held.cut(value)


def base() -> Tensors:
    """Return a base model of three tensors, two of them bfloat16."""
    torch.manual_seed(0)
    return Tensors(
        "/base",
        q__weight=torch.randn(6, 4).bfloat16(),
        norm__weight=torch.randn(4),
        lm_head__weight=torch.randn(8, 4).bfloat16(),
    )


def test_nan_and_infinity_are_found_and_what_cannot_hold_them_is_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        values = torch.ones(3, 2).to(dtype)
        assert is_finite(values)
        for bad in ("nan", "inf", "-inf") if dtype.itemsize > 1 else ("nan",):
            changed = values.float()
            changed[1, 1] = float(bad)
            assert not is_finite(changed.to(dtype))
        assert is_finite(torch.empty(0, dtype=dtype)), "an empty tensor holds neither"
    assert is_finite(torch.tensor([1, 2])) and is_finite(torch.tensor([True]))


def test_trained_weights_replace_those_of_the_base_in_its_dtype():
    trained = Tensors("/run", norm__weight=torch.full((4,), 3.0), lm_head__weight=torch.ones(8, 4))
    merged = MergedWeights(base(), trained, 0.0, tied=False)
    assert merged.names() == base().names() and merged.directory == Path("/run")
    assert torch.equal(merged.read("lm_head.weight"), torch.ones(8, 4).bfloat16())
    assert torch.equal(merged.read("norm.weight"), torch.full((4,), 3.0))
    assert torch.equal(merged.read("q.weight"), base().read("q.weight"))
    assert merged.files() == [Path("/run/file"), Path("/base/file")]
    assert size_of(merged) == 6 * 4 * 2 + 4 * 4 + 8 * 4 * 2


def test_lora_pairs_are_merged_before_a_slice_is_cut():
    a, b = torch.randn(2, 4), torch.randn(6, 2)
    merged = MergedWeights(base(), Tensors("/run", q__lora_A=a, q__lora_B=b), 0.5, tied=False)
    expected = (base().read("q.weight").float() + 0.5 * b @ a).bfloat16()
    assert torch.equal(merged.read("q.weight"), expected)
    held = ParameterSlice((6, 4), 0, 2, 3, 1)
    assert torch.equal(merged.read("q.weight", held), expected[2:5])


def test_a_tied_head_in_the_files_is_left_out():
    """It would differ from a trained embedding."""
    for tied in (True, False):
        merged = MergedWeights(base(), Tensors("/run"), 1.0, tied)
        assert ("lm_head.weight" in merged.names()) == (not tied)


def test_the_parts_of_a_weight_are_itself_or_its_pair():
    assert trained_parts("q.weight", {"q.weight"}) == ["q.weight"]
    assert trained_parts("q.weight", {"q.lora_A", "q.lora_B", "k.lora_A"}) == [
        "q.lora_A",
        "q.lora_B",
    ]
    assert trained_parts("q.weight", {"k.weight"}) == []


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"k__weight": torch.ones(1)}, "/run has k.weight, but /base has no tensor k.weight"),
        ({"norm__weight": torch.ones(5)}, "trained on norm.weight of shape [5], but in /base it"),
        ({"q__lora_A": torch.ones(2, 4)}, "/run has q.lora_A without q.lora_B: it is damaged"),
        (
            {"q__lora_A": torch.ones(2, 4), "q__lora_B": torch.ones(6, 3)},
            "/run has q.lora_A of rank 2 and lora_B of rank 3: it is damaged",
        ),
        (
            {"q__lora_A": torch.ones(2, 5), "q__lora_B": torch.ones(6, 2)},
            "trained on q.weight of shape [6, 5], but in /base it has shape [6, 4]",
        ),
        (
            {"q__lora_A": torch.ones(2), "q__lora_B": torch.ones(6, 2)},
            "q.lora_A in /run has shape [2] and is not a matrix",
        ),
    ],
)
def test_trained_tensors_of_another_model_are_refused(tensors, sentence):
    assert sentence in user_error(check_trained, base(), Tensors("/run", **tensors), base().names())


def test_a_sum_that_fp16_cannot_hold_is_refused():
    original, a, b = torch.ones(2, 2).half(), torch.full((1, 2), 300.0), torch.full((2, 1), 300.0)
    sentence = user_error(merge_lora, "q.weight", original, a, b, 1.0)
    assert sentence == (
        "q.weight with LoRA merged into it reaches 9e+04, more than float16 holds: convert the "
        "base model to bfloat16 first"
    )
    # An infinity that is in the weight already is not LoRA's.
    original[0, 0] = float("inf")
    assert merge_lora("q.weight", original, a, 0 * b, 1.0)[0, 0] == float("inf")
