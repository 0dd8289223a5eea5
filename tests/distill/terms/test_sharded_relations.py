"""The relations over a sharded sequence on 1 to 8 ranks, against dense float64 autograd."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
import torch.distributed as dist

from megalard.data.batch import collate
from megalard.distill.terms import sharded_relations
from megalard.distill.terms.sharded_relations import Operand, RelationPlan, relation_sums
from megalard.parallel.context.shard import SequenceShard
from megalard.parallel.mesh import SINGLE, Axis, build_mesh
from tests.logits import relative_error
from tests.ranks import run_ranks

RANKS = range(1, 9)
WEIGHTS = {"q": 0.5, "k": 2.0, "v": 1.0, "qk": 0.75}
HEADS = {"q": 4, "k": 2, "v": 2}
DIM = 8
# The chunks that a rank fetches, one less than the size of the smallest difference cover.
FETCHES = {1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 2, 8: 3}

# The rounding of fp32 (6e-8) over sums of some 100 terms, against float64. Observed at most 1e-6.
TOLERANCE = 5e-6


def length_of(ranks: int) -> int:
    """Return a length of three tokens per piece, so that the halves of a shared pair differ."""
    return 3 * (1 if ranks == 1 else 2 * ranks) * (8 if ranks == 1 else 1)


def make_batch(n: int, blocks: int = 3):
    """Return a packed block, a block with padding on both sides, and a nearly empty block."""
    third = n // 3
    layouts = [[(0, third), (third, n - 1), (n - 1, n)], [(2, n - 3)], [(0, 2)]]
    tokens = torch.zeros(n, dtype=torch.int64).numpy()
    return collate([(tokens, documents) for documents in layouts[:blocks]])


def make_operands(n: int, dim: int = DIM) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the student's and the teacher's vectors of each kind, [3, heads, n, dim]."""
    generator = torch.Generator().manual_seed(n)
    return {
        kind: tuple(torch.randn(3, heads, n, dim, generator=generator) for _ in range(2))
        for kind, heads in HEADS.items()
    }


@pytest.mark.parametrize("names", [("q",), ("q", "qk")])
def test_gradients_of_one_operand_are_rounded_once(names, monkeypatch):
    """The sum of 1 + 2^-9 and 2^-8 rounds to 1 + 2^-7 in bf16.

    If both are rounded before they are added, the sum is 1.
    """
    parts = {"q": 1 + 2.0**-9, "qk": 2.0**-8}
    dtypes = []

    def backward(rows, rows_t, columns, columns_t, *_, mask, out_dtype):
        dtypes.append(out_dtype)
        value = torch.full_like(rows, 1.0, dtype=torch.float32)
        if columns is None:
            return (value * parts["q"]).to(out_dtype)
        return (value * parts["qk"]).to(out_dtype), torch.zeros_like(columns)

    monkeypatch.setattr(sharded_relations, "relation_backward", backward)
    batch = make_batch(12)
    operands = {
        kind: Operand(student.bfloat16(), teacher.bfloat16())
        for kind, (student, teacher) in make_operands(12).items()
        if kind in {"q", names[-1][-1]}
    }
    plan = RelationPlan(SequenceShard(12), batch.doc_start_bn, batch.doc_end_bn)
    _, grads = relation_sums(operands, {name: 1.0 for name in names}, plan, True)
    assert grads["q"].dtype == torch.bfloat16
    assert (grads["q"] == (1 if names == ("q",) else 1 + 2.0**-7)).all()
    # A single gradient needs no copy in fp32.
    assert set(dtypes) == {torch.bfloat16 if names == ("q",) else torch.float32}


def run_all(results: str) -> None:
    """Compute the relations on the first 1, 2, ... 8 ranks; rank 0 writes the results."""
    mesh = build_mesh("cpu", 1)
    by_size = {}
    for ranks in RANKS:
        group = dist.new_group(list(range(ranks)))
        if mesh.world.rank < ranks:
            axis = SINGLE if ranks == 1 else Axis(group, mesh.world.rank, ranks)
            by_size[ranks] = one_rank(ranks, axis)
    gathered = [None] * mesh.world.size
    dist.all_gather_object(gathered, by_size)
    if mesh.world.rank == 0:
        torch.save({r: [part[r] for part in gathered if r in part] for r in RANKS}, results)


def one_rank(ranks: int, axis: Axis) -> dict:
    """Return what one rank computes, twice, and what it sends."""
    n = length_of(ranks)
    batch, shard = make_batch(n), SequenceShard(n, axis)
    operands = {
        kind: Operand(shard.cut(s, 2).contiguous(), shard.cut(t, 2).contiguous())
        for kind, (s, t) in make_operands(n).items()
    }
    plan = RelationPlan(shard, batch.doc_start_bn, batch.doc_end_bn)
    sums, grads = relation_sums(operands, WEIGHTS, plan, True)
    traffic = astuple(plan.traffic)
    again = relation_sums(operands, WEIGHTS, plan, True)
    return {
        "sums": sums,
        "gradients": grads,
        "positions": shard.local_positions(),
        "is_same": all(torch.equal(grads[kind], again[1][kind]) for kind in grads),
        "traffic": traffic,
    }


def dense(batch, operands, weights=WEIGHTS) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return sums and gradients in float64, of operands on the batch's device."""
    i = torch.arange(batch.shard.length, device=batch.doc_start_bn.device)
    start, end = batch.doc_start_bn[:, None, :, None], batch.doc_end_bn[:, None, :, None]
    allowed = (i >= start) & (i < end) & (i[None, :] <= i[:, None])
    student = {kind: s.double().requires_grad_() for kind, (s, _) in operands.items()}
    teacher = {kind: t.double() for kind, (_, t) in operands.items()}

    def log_softmax(rows, columns):
        columns = columns.repeat_interleave(rows.shape[1] // columns.shape[1], dim=1)
        scores = rows @ columns.transpose(-1, -2) / math.sqrt(rows.shape[3])
        return scores.masked_fill(~allowed, -1e30).log_softmax(-1)

    sums = {}
    for name in weights:
        row, column = ("q", "k") if name == "qk" else (name, name)
        log_s = log_softmax(student[row], student[column])
        log_t = log_softmax(teacher[row], teacher[column])
        sums[name] = (log_t.exp() * (log_t - log_s) * allowed).sum()
    sum(weights[name] * total for name, total in sums.items()).backward()
    return (
        {name: float(total.detach()) for name, total in sums.items()},
        {kind: x.grad for kind, x in student.items()},
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For each number of ranks, what its ranks computed."""
    file = tmp_path_factory.mktemp("sharded") / "results.pt"
    run_ranks(max(RANKS), run_all, str(file))
    return torch.load(file)


@pytest.mark.parametrize("ranks", RANKS)
def test_loss_and_gradients_match_dense_float64(ranks, results):
    n = length_of(ranks)
    sums, grads = dense(make_batch(n), make_operands(n))
    parts = results[ranks]
    assert len(parts) == ranks
    for name, expected in sums.items():
        total = sum(float(part["sums"][name]) for part in parts)
        assert total == pytest.approx(expected, rel=TOLERANCE)
    for kind, expected in grads.items():
        gathered = torch.full_like(expected, math.nan)
        for part in parts:
            gathered[:, :, part["positions"]] = part["gradients"][kind].double()
        assert relative_error(gathered, expected) < TOLERANCE, kind


@pytest.mark.parametrize("ranks", RANKS)
def test_a_second_run_has_the_same_bits(ranks, results):
    assert all(part["is_same"] for part in results[ranks])


@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_sends_its_chunk_once_per_fetch(ranks, results):
    """The operands of student and teacher, the gradients of the student, and five statistics."""
    tokens = 3 * length_of(ranks)
    chunk = tokens // ranks * sum(HEADS.values()) * DIM * 4
    rows = tokens * (sum(HEADS.values()) + HEADS["q"]) * 4
    fetches = FETCHES[ranks]
    for part in results[ranks]:
        reduced = 5 * rows if ranks > 1 else 0
        assert part["traffic"] == (2 * fetches * chunk, fetches * chunk, reduced)
