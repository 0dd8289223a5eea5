"""Updated weights arrive when the decoder asks for them, two buckets ahead, and in one order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.training.masters import sharded
from megalard.training.masters.bucket import Bucket
from megalard.training.masters.sharded import ShardedMasters
from tests.parity.cases import ALL_CASES, make_config, make_models
from tests.parity.worker import make_distiller, micro_batches
from tests.ranks import run_ranks

CASE = ALL_CASES["all-everything"]


@pytest.fixture
def started(monkeypatch):
    """The numbers of the modules whose buckets have been started."""
    numbers, start = [], Bucket.start_gather

    def noting(bucket):
        numbers.append(len(bucket.parameters[0]) - 1)
        return start(bucket)

    monkeypatch.setattr(sharded, "BUCKET_ELEMENTS", 1)
    monkeypatch.setattr(Bucket, "start_gather", noting)
    return numbers


def make() -> tuple[list[nn.ParameterList], ShardedMasters]:
    """Return five modules, of which number i has a parameter of i + 1 ones, and masters of 2."""
    modules = [nn.ParameterList([torch.ones(number + 1)]) for number in range(5)]
    pairs = [(module[0], SINGLE) for module in modules]
    masters = ShardedMasters(pairs, torch.float32, torch.float32, is_offloaded=False)
    for bucket in masters.buckets:
        bucket.master.data.fill_(2.0)
    return modules, masters


def updated(modules) -> list[bool]:
    return [bool((module[0] == 2).all()) for module in modules]


def test_a_bucket_arrives_when_its_module_is_used_and_two_are_on_the_way(started):
    modules, masters = make()
    publication = masters.publication
    publication.start()
    assert started == [0, 1] and not any(updated(modules))
    publication.before_use(modules[0])
    assert started == [0, 1, 2] and updated(modules) == [True, *4 * [False]]
    publication.before_use(modules[0])
    publication.before_use(nn.Linear(1, 1))
    assert started == [0, 1, 2], "there is nothing to complete"
    publication.before_use(modules[2])
    assert started == [0, 1, 2, 3, 4] and updated(modules) == [*3 * [True], False, False]
    publication.complete()
    assert all(updated(modules))


def test_a_publication_completes_the_one_before_it(started):
    modules, masters = make()
    masters.publication.start()
    masters.publication.start()
    assert started == [0, 1, 2, 3, 4, 0, 1] and all(updated(modules))


def _without_asking(folder: str) -> None:
    """Two ranks: weights that are on the way when everything else reads or ends."""
    mesh = build_mesh("cpu", 1)
    config = make_config(CASE, Path(folder))
    parallel = dataclasses.replace(config.parallel, shard_optimizer=True)
    distiller = make_distiller(dataclasses.replace(config, parallel=parallel), mesh)
    student = distiller.student

    def step(number: int) -> None:
        distiller.step(micro_batches(CASE, number, mesh, 1), number)

    def stale() -> set[str]:
        values = {name: distiller.masters.value(name) for name in student.trained}
        return {n for n, p in student.trained.items() if not torch.equal(p, values[n])}

    step(0)
    assert stale() == set(student.trained), "every weight has changed and none has arrived"
    (batch,) = micro_batches(CASE, 1, mesh, 2)["main"]
    with torch.no_grad():
        student.decoder.embed(batch.tokens_bs, torch.float32)
        assert "model.embed_tokens.weight" not in stale()
        student.decoder(batch, torch.float32)
        assert stale() <= {"model.norm.weight"}, "only the final norm has not been used"
        student.decoder.final_norm(torch.zeros(1, student.decoder.spec.hidden_size))
        assert not stale()
    step(1)
    student.complete()
    assert not stale()
    step(2)
    student.release()
    assert all(not parameter.numel() for parameter in student.trained.values())
    assert not student.decoder.weight_sources


def test_the_decoder_has_the_updated_weights_wherever_it_is_used(tmp_path):
    make_models(CASE, tmp_path)
    run_ranks(2, _with_small_buckets, str(tmp_path))


def _with_small_buckets(folder: str) -> None:
    sharded.BUCKET_ELEMENTS = 1
    _without_asking(folder)
