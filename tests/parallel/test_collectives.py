"""How many collectives a step takes: what a CPU can see of a step's speed."""

from __future__ import annotations

import collections
import json

import torch.distributed as dist

from megalard.parallel import collectives
from megalard.parallel.mesh import build_mesh
from tests.parity.cases import Case, make_config, make_models
from tests.parity.worker import make_distiller, micro_batches
from tests.ranks import run_ranks

LAYERS = 3
CASE = Case("llama", "lora", data="whole")


def _count(folder: str, results: str) -> None:
    """Collectives of one micro-step and of what follows it, on two tensor-parallel ranks."""
    counts: collections.Counter[str] = collections.Counter()

    def counted(name, function):
        def call(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return call

    dist.all_reduce = counted("all-reduce", dist.all_reduce)
    collectives._all_gather = counted("all-gather", collectives._all_gather)
    collectives._reduce_scatter = counted("reduce-scatter", collectives._reduce_scatter)
    mesh = build_mesh("cpu", 2)
    config = make_config(CASE, folder, tp=2)
    distiller = make_distiller(config, mesh)
    batches = {name: part[:1] for name, part in micro_batches(CASE, 0, mesh, 1).items()}
    found = []
    for work in (
        lambda: distiller.accumulate(batches, 0),
        lambda: distiller.gradients.reduce(),
        lambda: distiller.gradients.norm(),
    ):
        counts.clear()
        work()
        found.append(dict(counts))
    if mesh.world.rank == 0:
        with open(results, "w") as file:
            json.dump(found, file)


def test_a_step_takes_no_more_collectives_than_its_layers_need(tmp_path):
    """Counted by hand from ``parallel.linear``; of the last layer only q, k and v are computed."""
    make_models(CASE, tmp_path)
    run_ranks(2, _count, tmp_path, str(tmp_path / "counts.json"))
    micro_step, reduction, norm = json.loads((tmp_path / "counts.json").read_text())
    whole = LAYERS - 1
    # forward, teacher: the input of q, k, v; o; the input of gate and up; down. The student adds
    # LoRA's low-rank output; both embed the same tokens with the same weights, once.
    gathers = 2 * whole + 1 + (3 * whole + 2)
    scatters = 1 + 2 * whole + 2 * whole
    # backward of the student, each exchange's transpose: o and down; LoRA's low-rank outputs, the
    # inputs of q, k, v (but of the first layer, whose embedding is frozen), of gate and up
    gathers += 2 * whole
    scatters += LAYERS + (LAYERS - 1) + whole
    assert micro_step == {"all-gather": gathers, "reduce-scatter": scatters}
    # parameters held by one rank, by both, and nothing between data-parallel ranks
    assert reduction == {"all-reduce": 1} and norm == {"all-reduce": 1}
