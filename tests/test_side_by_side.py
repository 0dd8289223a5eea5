"""Tracks that run in turns."""

import numpy as np
import pytest
import torch

from megalard.data.batch import collate
from megalard.distill.side_by_side import SideBySide


def track(name: str, steps: int, log: list[str]):
    for step in range(steps):
        log.append(f"{name}{step}")
        yield
    return name


@pytest.mark.parametrize("steps", [(3, 3), (1, 3), (3, 0)])
def test_tracks_take_turns_and_give_their_results(steps):
    log = []
    tracks = [track(name, count, log) for name, count in zip("ab", steps, strict=True)]
    assert SideBySide(torch.device("cpu"), halves=True)(tracks) == ["a", "b"]
    assert sorted(log) == sorted(
        f"{n}{i}" for n, c in zip("ab", steps, strict=True) for i in range(c)
    )
    shared = 2 * min(steps)
    assert [entry[0] for entry in log[:shared]] == ["a", "b"] * (shared // 2)


@pytest.mark.parametrize(
    ("blocks", "halves", "sizes"),
    [(1, True, [1]), (2, True, [1, 1]), (5, True, [3, 2]), (5, False, [5])],
)
def test_halves_of_a_batch_keep_every_block(blocks, halves, sizes):
    batch = collate([(np.full(8, row), [(0, 8)]) for row in range(blocks)])
    parts = SideBySide(torch.device("cpu"), halves).split(batch)
    assert [len(part.tokens_bs) for part in parts] == sizes
    assert torch.equal(torch.cat([part.tokens_bs for part in parts]), batch.tokens_bs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_streams_give_what_one_gives_forward_and_backward():
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024, device="cuda") / 32

    def chain(x, w):
        for _ in range(20):
            x = torch.tanh(x @ w)
            yield
        return x.square().sum()

    found = []
    for halves in (False, True):
        side_by_side, results = SideBySide(torch.device("cuda"), halves), []
        for seed in range(5):  # memory freed by one pass is taken by the next
            generator = torch.Generator("cuda").manual_seed(seed)
            w = weight.clone().requires_grad_()
            x = [torch.randn(2048, 1024, device="cuda", generator=generator) for _ in range(2)]
            loss = sum(side_by_side([chain(part, w) for part in x]))
            loss.backward()
            results += [loss.detach(), w.grad]
        found.append(results)
    for one, two in zip(*found, strict=True):
        # the gradients of two tracks may be added in either order
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
