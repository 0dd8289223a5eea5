"""A pair of small decoders, and a batch with documents and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megalard.data.batch import Batch, collate
from megalard.model.decoder import Decoder
from tests.logits import load
from tests.models import make_model

DOCUMENTS = [[(0, 5), (5, 12)], [(2, 9)]]
LENGTH = 12


@pytest.fixture(scope="package")
def decoders(tmp_path_factory) -> tuple[Decoder, Decoder]:
    """A teacher and a student of the same shape with different weights."""
    folder = tmp_path_factory.mktemp("terms")
    return tuple(
        load(make_model("llama", folder / name, seed=seed))
        for name, seed in (("teacher", 0), ("student", 1))
    )


@pytest.fixture
def batch() -> Batch:
    """Two blocks of 12 tokens: two documents, and one document with padding around it."""
    tokens = np.random.default_rng(0).integers(0, 67, (2, LENGTH))
    return collate(list(zip(tokens, DOCUMENTS, strict=True)))


@pytest.fixture
def hidden() -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the last layer [24, 32], of the teacher and of the student."""
    torch.manual_seed(0)
    return torch.randn(2 * LENGTH, 32), torch.randn(2 * LENGTH, 32)
