"""Masters divided over ranks: the same step, less memory, the same bits every time."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from megalard.model.names import kind_of
from megalard.parallel.collectives import all_reduce
from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.training.masters import sharded
from megalard.training.masters.sharded import ShardedMasters
from tests.parity.cases import ALL_CASES, make_config, make_models
from tests.parity.worker import make_distiller, micro_batches
from tests.ranks import run_ranks

CASE = ALL_CASES["all-everything"]


def trained(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


def make(parameters: list[nn.Parameter]) -> ShardedMasters:
    pairs = [(parameter, SINGLE) for parameter in parameters]
    return ShardedMasters(pairs, torch.float32, torch.float32, is_offloaded=False)


def test_buckets_are_filled_from_the_end_of_the_model(monkeypatch):
    monkeypatch.setattr(sharded, "BUCKET_ELEMENTS", 10)
    parameters = trained((4,), (30,), (5,), (6,), (2,))
    filled = [[*map(len, bucket.parameters)] for bucket in make(parameters).buckets]
    assert filled == [[2, 6, 5], [30], [4]]


def test_a_bucket_is_sent_when_the_backward_pass_has_filled_it(monkeypatch):
    monkeypatch.setattr(sharded, "BUCKET_ELEMENTS", 1)
    first, second, third = trained((2,), (2,), (2,))
    masters = make([first, second, third])
    sent = []
    for bucket in masters.buckets:
        start = bucket.start_reduction
        bucket.start_reduction = lambda b=bucket, s=start: sent.append(b) or s()
    seen = []
    x = torch.ones(2) * first
    x.register_hook(lambda _: seen.append(len(sent)))
    (x * second * third).sum().backward()
    masters.end_backward()
    assert seen == [2], "the last two buckets are sent before the gradient of the first is computed"
    assert sent == masters.buckets


def test_what_a_loss_does_not_reach_is_sent_at_the_end(monkeypatch):
    monkeypatch.setattr(sharded, "BUCKET_ELEMENTS", 1)
    parameters = trained((2,), (2,), (2,))
    masters = make(parameters)
    for _ in range(2):
        (parameters[0].sum() * 3 + parameters[2].sum()).backward()
        masters.end_backward()
    masters.reduce()
    assert [b.gradient.tolist() for b in masters.buckets] == [[2.0, 2], [0.0, 0], [6.0, 6]]


def test_the_hooks_of_parameters_do_not_keep_the_masters():
    parameters = trained((3,))
    masters = make(parameters)
    reference = weakref.ref(masters)
    gc.disable()
    try:
        del masters
        assert reference() is None
    finally:
        gc.enable()
    parameters[0].sum().backward()


def _memory_and_bits(folder: str) -> None:
    """Four ranks: divided and undivided state of the same run, and the same run twice."""
    mesh = build_mesh("cpu", 1)
    config, results = make_config(CASE, Path(folder)), []
    for is_sharded in (False, True, True):
        parallel = dataclasses.replace(
            config.parallel, shard_optimizer=is_sharded, offload_optimizer=False
        )
        distiller = make_distiller(dataclasses.replace(config, parallel=parallel), mesh)
        for step in range(2):
            distiller.step(micro_batches(CASE, step, mesh, 1), step)
        masters = distiller.masters
        bytes_of = {
            "masters": sum(p.numel() for p in masters.parameters),
            "gradients": sum(gradient.numel() for gradient in masters.gradients),
            "moments": sum(
                state[key].numel()
                for state in distiller.optimizer.state.values()
                for key in ("exp_avg", "exp_avg_sq")
            ),
        }
        weights = {name: masters.value(name).clone() for name in masters.parts}
        masters.complete()
        for name, parameter in distiller.student.trained.items():
            assert torch.equal(parameter, weights[name]), "every rank has the updated weights"
        results.append((bytes_of, weights))
    (whole, plain), (part, first), (_, second) = results
    for name, value in first.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(value, second[name]), name
    rows = {name: value.shape for name, value in plain.items()}
    elements = sum(-(-shape[0] // 4) * shape[1:].numel() for shape in rows.values())
    assert part == {"masters": elements, "gradients": elements, "moments": 2 * elements}
    assert whole["masters"] == sum(shape.numel() for shape in rows.values())
    # Padding is all that is more than a quarter.
    assert elements < 1.1 * whole["masters"] / 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(CASE, folder)
    return folder


def test_four_ranks_hold_a_quarter_each_and_take_the_same_step(models):
    run_ranks(4, _memory_and_bits, str(models))


def _norms(folder: str) -> None:
    """Compare the norm of each kind of parameter with its gradients; both ranks call this."""
    for cp, tp in ((1, 1), (2, 1), (1, 2)):
        mesh = build_mesh("cpu", tp, cp)
        for is_sharded in (False, True):
            config = make_config(CASE, Path(folder), tp, cp, "float32")
            parallel = dataclasses.replace(
                config.parallel, shard_optimizer=is_sharded, offload_optimizer=False
            )
            distiller = make_distiller(dataclasses.replace(config, parallel=parallel), mesh)
            result = distiller.step(micro_batches(CASE, 0, mesh, 1), 0)
            squares: dict[str, torch.Tensor] = {}
            for name in distiller.masters.parts:
                held = distiller.student.decoder.slices[name]
                square = distiller.masters.gradient(name).square().sum() / held.replicas
                squares[kind_of(name)] = squares.get(kind_of(name), torch.zeros(())) + square
            clipped = result.gradient_norm / min(config.optimizer.clip, result.gradient_norm)
            for kind, square in squares.items():
                expected = all_reduce(square, mesh.tp).sqrt() * clipped
                assert result.gradient_norms[kind] == pytest.approx(float(expected), rel=1e-4)


def test_the_norms_of_kinds_are_those_of_their_gradients(models):
    run_ranks(2, _norms, str(models))
