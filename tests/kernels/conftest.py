"""Fixtures of the kernel tests."""

import pytest

from megalard.kernels.relation_kl import torch_reference


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Take tiles of 16 x 16, so that short sequences have full, edge and skipped tiles."""
    tiles = pytest.importorskip("megalard.kernels.relation_kl.triton.tiles")
    tiny = dict.fromkeys(tiles.FORWARD_TILES, (16, 16, 4, 1))
    monkeypatch.setattr(tiles, "FORWARD_TILES", tiny)
    monkeypatch.setattr(tiles, "BACKWARD_TILES", tiny)
    monkeypatch.setattr(torch_reference, "BLOCK_ROWS", 16)
    monkeypatch.setattr(torch_reference, "TILE_ELEMENTS", 1)
