"""The gathered layers of the estimate against what ranks hold while they take a step."""

from __future__ import annotations

import pytest
import torch

from megalard.estimate.gathered_layers import GatheredLayers
from megalard.estimate.gpus import Machines, parse_gpus
from megalard.estimate.memory import LAYERS, stage_memory
from megalard.estimate.rank_layout import RankLayout
from megalard.estimate.time import gather_times
from megalard.estimate.weights import parameters_of, trained_of
from megalard.parallel.divided_weights import DividedParameter, LayerGathers
from megalard.parallel.mesh import build_mesh
from tests.estimate.test_time import SPEC, times
from tests.ranks import run_ranks
from tools.bench.random_model import random_spec
from tools.bench.random_run import make_config, make_distiller, random_batches

CASES = {
    "lora": {},
    "weights": {"trainable.mode": "weights"},
    "all": {"trainable.mode": "all", "objective.logits_kl": 1},
    "alone": {
        "trainable.mode": "all",
        "objective.language_modelling": 1,
        **{f"objective.relations.{name}": 0 for name in "qkv"},
    },
}


def _compare() -> None:
    """Compare the most elements of gathered weights in each pass; every rank calls this."""
    mesh, move, held = build_mesh("cpu", 1), LayerGathers._move, {}

    def noting(gathers, number, ahead):
        move(gathers, number, ahead)
        is_backward = torch._C._current_graph_task_id() != -1
        held[is_backward] = max(held.get(is_backward, 0), gathered())

    LayerGathers._move = noting
    for case, settings in CASES.items():
        held.clear()
        settings = {"trainable.lora.rank": 6, "data.context_length": 32, **settings}
        settings |= {"optimizer.global_batch": 2, "run.device": "cpu"}
        config = make_config({"parallel.shard_weights": True, **settings})
        distiller = make_distiller(config, random_spec("tiny", 32), mesh)
        models = [distiller.student.decoder, *([distiller.teacher] if distiller.teacher else [])]
        parameters = {p for model in models for p in model.parameters()}
        divided = [p for p in parameters if isinstance(p, DividedParameter)]

        def gathered(divided=divided) -> int:
            return sum(p.numel() for p in divided if p.is_gathered)

        for number in range(2):
            distiller.step(random_batches(config, models[0].spec, mesh), number)
        spec = distiller.student.decoder.spec
        estimate = parameters_of(config, 0, spec, RankLayout(dp=2)).gathered
        assert held == {False: estimate.forward, True: estimate.backward}, case
        assert gathered() <= estimate.between_steps, case
        memory = stage_memory(config, 0, spec, RankLayout(dp=2))
        assert memory.kinds[LAYERS] > 0 == stage_memory(config, 0, spec, RankLayout()).kinds[LAYERS]


def test_two_ranks_gather_as_many_elements_as_estimated():
    run_ranks(2, _compare)


def test_what_both_models_share_exists_once():
    """A layer of ten elements, of which the student has three of its own."""
    layers = GatheredLayers(teacher=10, shared=7, student=3)
    assert layers.forward == 2 * 10 + 2 * 3
    assert layers.backward == 2 * 10 + 3, "the teacher has three that the student has not"
    assert GatheredLayers(10, 10, 0).backward == GatheredLayers(10, 10, 0).forward == 20


def test_gathers_cost_time_where_the_network_is_slow():
    """Half of the weights of 32 layers, for both passes, over links of 1 GB/s."""
    layout, settings = RankLayout(dp=2), {"nodes": 2, "network": 1e9}
    whole = times(layout, **settings)
    divided = times(layout, parallel__shard_weights=True, **settings)
    assert sum(divided.values()) >= sum(whole.values())
    config = make_config({"parallel.shard_weights": True})
    (stream,) = config.all_streams().values()
    machines = Machines(parse_gpus("1 x H100", None, None)[1], 1, 2, 1e9)
    trained = trained_of(config, SPEC, layout)
    forward, backward = gather_times(trained, config, stream, SPEC, layout, machines)
    bytes_of_layers = 32 * 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert forward == backward == pytest.approx(bytes_of_layers / 2 / 1e9)
