"""Two halves of a micro-batch, each on a CUDA stream of its own.

With tensor parallelism a layer is products and exchanges in turns, each waiting for the one before.
Two halves of the blocks are independent, so the exchanges of one run under the products of the
other, forward, and backward too: autograd runs an operation's gradient on the operation's stream
(as DeepSpeed's Domino, Wang et al., 2409.15241).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from megalard.data.batch import Batch


class SideBySide:
    """Runs generators in turns, from one ``yield`` to the next, and gives what they return.

    Every rank makes the same turns, so the collectives of all tracks have one order. Keeps its
    second stream: the memory allocator has a pool for each stream.

    Args:
        device: of the ranks' work; on a CPU the turns are one after the other.
        halves: whether micro-batches are split at all.
    """

    def __init__(self, device: torch.device, halves: bool):
        self._halves = halves
        self._stream = torch.cuda.Stream(device) if halves and device.type == "cuda" else None

    def split(self, batch: Batch) -> list[Batch]:
        """A micro-batch as two halves of its blocks, or whole."""
        blocks = len(batch.tokens_bs)
        if blocks == 1 or not self._halves:
            return [batch]
        middle = (blocks + 1) // 2
        return [batch.rows(0, middle), batch.rows(middle, blocks)]

    def __call__(self, tracks: Sequence[Generator]) -> list:
        """The tracks' return values; at most two tracks. They share no tensor they write to."""
        if len(tracks) == 1 or self._stream is None:
            return _in_turns([(track, None) for track in tracks])
        first, second = tracks
        here = torch.cuda.current_stream(self._stream.device)
        # before it starts, and so before it reuses memory that was freed here
        self._stream.wait_stream(here)
        results = _in_turns([(first, None), (second, self._stream)])
        here.wait_stream(self._stream)
        return results


def _in_turns(tracks: Sequence[tuple[Generator, torch.cuda.Stream | None]]) -> list:
    results, running = {}, dict(enumerate(tracks))
    while running:
        for number, (track, stream) in list(running.items()):
            with torch.cuda.stream(stream):
                try:
                    next(track)
                except StopIteration as end:
                    results[number] = end.value
                    del running[number]
    return [results[number] for number in range(len(tracks))]
