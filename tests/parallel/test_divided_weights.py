"""Divided parameters and the gathers of layers: what exists when, and what autograd reads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megalard.model.parameter_slice import full_slice
from megalard.parallel import divided_weights
from megalard.parallel.divided_weights import (
    DividedParameter,
    LayerGathers,
    WeightDivision,
    is_divided_weight,
    kept_bytes,
)
from megalard.parallel.mesh import SINGLE, Axis, build_mesh
from tests.ranks import run_ranks

NUM_LAYERS = 5
DOWN = "model.layers.0.mlp.down_proj.weight"


class Gather:
    """A gather in one process, which brings a value as late as it may: when it is waited for."""

    def __init__(self, out: torch.Tensor, value: torch.Tensor):
        self.out, self.value = out, value
        out.fill_(float("nan"))

    def wait(self) -> None:
        self.out.copy_(self.value)


@pytest.fixture
def make(monkeypatch):
    """A function that returns a parameter of rank 0 of 2 with a random value, and the value."""
    values = {}

    def start(out, rows, axis):
        return Gather(out, values[rows.data_ptr()])

    monkeypatch.setattr(divided_weights, "start_all_gather_tokens_into", start)

    def parameter(
        *shape: int, requires_grad: bool = False
    ) -> tuple[DividedParameter, torch.Tensor]:
        value = torch.randn(shape)
        divided = DividedParameter(torch.empty(0), requires_grad)
        divided.keep_rows(value, Axis(None, 0, 2), torch.float32)
        padding = torch.zeros(-shape[0] % 2, *shape[1:])
        values[divided.rows.data_ptr()] = torch.cat([value, padding])
        return divided, value

    return parameter


def nbytes(parameter: nn.Parameter) -> int:
    return parameter.untyped_storage().nbytes()


def test_a_parameter_has_its_shape_and_no_memory_until_it_is_gathered(make):
    parameter, value = make(7, 3)
    assert parameter.shape == (7, 3) and nbytes(parameter) == 0 and not parameter.is_gathered
    assert torch.equal(parameter.rows, value[:4]) and kept_bytes([parameter]) == 4 * 3 * 4
    parameter.start()
    parameter.start()
    parameter.finish()
    assert torch.equal(parameter, value) and nbytes(parameter) == 8 * 3 * 4
    parameter.free()
    assert nbytes(parameter) == 0
    parameter.start()
    parameter.free()
    assert nbytes(parameter) == 0 and parameter._pending is None, "the gather was waited for"


def test_autograd_reads_what_a_later_gather_has_written(make):
    parameter, value = make(6, 3, requires_grad=True)
    x = torch.randn(2, 3, requires_grad=True)
    parameter.start()
    parameter.finish()
    y = F.linear(x, parameter)
    parameter.free()
    parameter.start()
    parameter.finish()
    assert parameter._version == 0
    y.sum().backward()
    torch.testing.assert_close(x.grad, value.sum(0).expand(2, 3))
    assert parameter.grad.shape == (6, 3)


def test_written_rows_replace_what_was_gathered(make):
    parameter, value = make(7, 3)
    parameter.start()
    parameter.write(parameter.local_part(value + 1))
    assert nbytes(parameter) == 0 and torch.equal(parameter.rows, value[:4] + 1)


def test_the_last_rank_s_rows_are_padded_with_zeros():
    divided = DividedParameter(torch.empty(0), False)
    divided.keep_rows(torch.ones(5, 2), Axis(None, 2, 3), torch.float32)
    assert divided.rows.tolist() == [[1, 1], [0, 0]]
    assert divided.local_part(torch.full((5, 2), 3.0)).tolist() == [3, 3, 0, 0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (DOWN, True),
        ("model.layers.3.self_attn.k_proj.weight", True),
        ("model.layers.3.self_attn.k_proj.bias", False),
        ("model.layers.3.self_attn.k_proj.lora_A", False),
        ("model.layers.3.self_attn.q_norm.weight", False),
        ("model.layers.3.input_layernorm.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_the_weights_of_projections_in_layers_are_divided(name, expected):
    assert is_divided_weight(name) == expected


def test_what_one_rank_holds_alone_stays_whole():
    division = WeightDivision(build_mesh("cpu", 1), 1)
    value = torch.ones(4, 2)
    arguments = (full_slice((4, 2)), value, torch.device("cpu"), torch.bfloat16)
    frozen = division.parameter(DOWN, *arguments)
    trained = division.parameter(DOWN, *arguments, is_trained=True)
    assert not isinstance(frozen, DividedParameter) and frozen.dtype == torch.bfloat16
    assert trained.dtype == torch.float32 and trained.requires_grad


class Stack(nn.Module):
    """As much of a decoder as ``LayerGathers`` reads, with layers of one weight."""

    def __init__(self, weights: list[DividedParameter], tied_embeddings: bool = False):
        super().__init__()
        self.spec = SimpleNamespace(tied_embeddings=tied_embeddings)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Module()
        self.model.layers = nn.ModuleList(nn.ParameterList([weight]) for weight in weights)

    def present(self) -> list[int]:
        """Return the numbers of the layers whose weights have memory."""
        return [n for n, layer in enumerate(self.model.layers) if nbytes(layer[0])]


@pytest.mark.parametrize("reach", [NUM_LAYERS, 3])
def test_two_layers_exist_at_a_time_forward_and_backward(reach, make):
    """Also if the loss stops before the last layer, and the next pass finds the first layer."""
    made = [make(4, 4) for _ in range(NUM_LAYERS)]
    stack = Stack([parameter for parameter, _ in made])
    gathers = LayerGathers(stack)
    forward, backward = [], []
    for _ in range(2):
        forward.clear()
        x = start = torch.randn(2, 4, requires_grad=True)
        gathers.before_use(stack.model.embed_tokens)
        for layer in stack.model.layers[:reach]:
            gathers.before_use(layer)
            forward.append(stack.present())
            x = F.linear(x, layer[0])
            x.register_hook(lambda _: backward.append(stack.present()))
            gathers.after_layer(layer, [x])
        x.sum().backward()
        expected = torch.linalg.multi_dot([torch.ones(2, 4), *(v for _, v in made[:reach][::-1])])
        torch.testing.assert_close(start.grad, expected)
        ends = [{number, number + 1} & {*range(NUM_LAYERS)} for number in range(reach)]
        assert [set(numbers) for numbers in forward] == ends
        # This hook precedes that of the gathers: it sees what the layer above has left.
        assert all(len(numbers) <= 2 for numbers in backward)
        assert stack.present() == [0]


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_first_layer_is_gathered_with_the_embedding_and_not_with_a_tied_head(is_tied, make):
    stack = Stack([make(4, 4)[0] for _ in range(NUM_LAYERS)], is_tied)
    gathers = LayerGathers(stack)
    gathers.before_use(stack.model.embed_tokens)
    assert stack.present() == ([] if is_tied else [0])


def test_layers_that_two_decoders_share_are_gathered_once(make, monkeypatch):
    made = [make(4, 4)[0] for _ in range(NUM_LAYERS)]
    started, start = [], DividedParameter.start

    def noting(parameter):
        if not parameter.is_gathered:
            started.append(id(parameter))
        start(parameter)

    monkeypatch.setattr(DividedParameter, "start", noting)
    teacher, student = Stack(made), Stack(made)
    sources = [(stack, LayerGathers(stack)) for stack in (teacher, student)]
    for number in range(NUM_LAYERS):
        for stack, gathers in sources:
            gathers.before_use(stack.model.layers[number])
            assert number in stack.present() and len(stack.present()) <= 2
            assert not made[number].detach().isnan().any()
    assert started == [id(parameter) for parameter in made]


def _over_ranks() -> None:
    """Three ranks: uneven rows, none on the last rank, and three dimensions of a value."""
    mesh = build_mesh("cpu", 1)
    division = WeightDivision(mesh, 1)
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 2, 4, 6, 7):
        value = torch.randn(rows, 5, generator=generator)
        held = full_slice((rows, 5))
        parameter = division.parameter(DOWN, held, value, mesh.device, torch.bfloat16, True)
        assert parameter.rows.dtype == torch.float32
        assert torch.equal(parameter.value().cpu(), value), "fp32 until masters take the rows"
        for dtype in (torch.float32, torch.bfloat16):
            parameter.rows = parameter.rows.to(dtype)
            parameter.start()
            parameter.finish()
            assert torch.equal(parameter.detach().cpu(), value.bfloat16())
            parameter.free()
    assert mesh.data.size == 3 and mesh.tp == SINGLE


def test_ranks_gather_what_they_have_divided():
    run_ranks(3, _over_ranks)
