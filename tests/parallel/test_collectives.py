"""Collectives: pairs of them are each other's transpose, and a step takes no more than it needs."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter

import torch
import torch.distributed as dist

from megalard.parallel import collectives
from megalard.parallel.mesh import SINGLE, build_mesh
from tests.parity.cases import Case, make_config, make_models
from tests.parity.worker import make_distiller, micro_batches
from tests.ranks import run_ranks

LAYERS = 3
CASE = Case("llama", "lora", data="whole", depth=3)


def _publish(distiller) -> None:
    distiller.masters.publish()
    distiller.masters.complete()


def _count(folder: str, results: str) -> None:
    """Count the collectives of the parts of a step with one micro-batch, on two tp ranks."""
    counts: Counter[str] = Counter()

    def counting(name, function):
        def call(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return call

    dist.all_reduce = counting("all-reduce", dist.all_reduce)
    collectives._all_gather = counting("all-gather", collectives._all_gather)
    collectives._reduce_scatter = counting("reduce-scatter", collectives._reduce_scatter)
    mesh = build_mesh("cpu", 2)
    batches = {name: part[:1] for name, part in micro_batches(CASE, 0, mesh, 1).items()}
    results_of_parts = []
    for is_sharded in (False, True):
        config = make_config(CASE, folder, tp=2)
        parallel = dataclasses.replace(config.parallel, shard_optimizer=is_sharded)
        distiller = make_distiller(dataclasses.replace(config, parallel=parallel), mesh)
        for work in (
            functools.partial(distiller.accumulate, batches, 0),
            distiller.masters.reduce,
            distiller.masters.norm,
            functools.partial(_publish, distiller),
        ):
            counts.clear()
            work()
            results_of_parts.append(dict(counts))
    if mesh.world.rank == 0:
        with open(results, "w") as file:
            json.dump(results_of_parts, file)


def test_a_step_takes_no_more_collectives_than_its_layers_need(tmp_path):
    """Counted by hand. Of the last layer only q, k and v are computed."""
    make_models(CASE, tmp_path)
    run_ranks(2, _count, tmp_path, str(tmp_path / "counts.json"))
    results = json.loads((tmp_path / "counts.json").read_text())
    micro_batch, reduction, norm, publication = results[:4]
    complete = LAYERS - 1  # layers that are computed completely
    # Forward, per layer of the teacher: gather the input of q, k and v, scatter o, gather the input
    # of gate and up, scatter down. The student also gathers LoRA's low-rank output. Both embed the
    # same tokens with the same weights, once.
    gathers = 2 * complete + 1 + (3 * complete + 2)
    scatters = 1 + 2 * complete + 2 * complete
    # Backward, the transpose of each exchange of the student: o and down; then LoRA's low-rank
    # outputs, the inputs of q, k and v (except in the first layer, whose embedding is frozen), and
    # the inputs of gate and up.
    gathers += 2 * complete
    scatters += LAYERS + (LAYERS - 1) + complete
    assert micro_batch == {"all-gather": gathers, "reduce-scatter": scatters}
    # One for the parameters that both ranks hold. The others need none, and dp has one rank.
    assert reduction == {"all-reduce": 1} and norm == {"all-reduce": 1} and publication == {}
    # The A of all pairs is divided: one bucket, whose gradients are reduced with the micro-batch.
    micro_batch, reduction, norm, publication = results[4:]
    assert micro_batch == {"all-gather": gathers, "reduce-scatter": scatters + 1}
    assert reduction == {} and norm == {"all-reduce": 2} and publication == {"all-gather": 1}


def _pairs() -> None:
    axis, rank = build_mesh("cpu", 3).tp, dist.get_rank()
    parts = [torch.arange(8.0).view(4, 2) + 10 * r for r in range(3)]
    x = parts[rank].clone().requires_grad_()
    gathered = collectives.gather_from_sequence_parallel_region(x, axis)
    assert torch.equal(gathered, torch.cat(parts))
    # Every rank has another gradient of the gathered tokens; the owner gets their sum.
    gathered.backward(torch.full((12, 2), float(rank + 1)))
    assert torch.equal(x.grad, torch.full((4, 2), 6.0))

    full = [torch.arange(24.0).view(12, 2) * (r + 1) for r in range(3)]
    x = full[rank].clone().requires_grad_()
    scattered = collectives.reduce_scatter_to_sequence_parallel_region(x, axis)
    assert torch.equal(scattered, sum(full)[4 * rank : 4 * rank + 4])
    scattered.backward(torch.full((4, 2), float(rank + 1)))
    assert x.grad[:, 0].tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4

    # Started collectives return the same.
    pending = collectives.start_all_gather_tokens(parts[rank], axis)
    assert torch.equal(pending.wait(), torch.cat(parts))
    pending = collectives.start_reduce_scatter_tokens(full[rank], axis)
    assert torch.equal(pending.wait(), sum(full)[4 * rank : 4 * rank + 4])
    total = collectives.all_reduce(torch.tensor([float(rank)]), axis)
    largest = collectives.all_reduce(torch.tensor([float(rank)]), axis, dist.ReduceOp.MAX)
    assert (total.item(), largest.item()) == (3, 2)


def test_gather_and_scatter_are_each_other_s_transpose():
    run_ranks(3, _pairs)


def test_an_axis_of_one_rank_communicates_nothing():
    x = torch.ones(2, 2)
    for collective in (
        collectives.all_reduce,
        collectives.all_gather_tokens,
        collectives.reduce_scatter_tokens,
        collectives.gather_from_sequence_parallel_region,
        collectives.reduce_scatter_to_sequence_parallel_region,
        collectives.all_reduce_with_gradient,
    ):
        assert collective(x, SINGLE) is x


def _sum_with_gradient() -> None:
    axis, rank = build_mesh("cpu", 3).tp, dist.get_rank()
    x = torch.tensor([float(rank)], requires_grad=True)
    total = collectives.all_reduce_with_gradient(x, axis)
    assert total.item() == 0 + 1 + 2
    # The sum is in the loss of every rank, so its gradient is the sum of theirs.
    total.backward(torch.tensor([10.0**rank]))
    assert x.grad.item() == 111
    assert torch.equal(x.detach(), torch.tensor([float(rank)])), "the input is unchanged"


def test_a_sum_has_the_gradients_of_all_ranks():
    run_ranks(3, _sum_with_gradient)
