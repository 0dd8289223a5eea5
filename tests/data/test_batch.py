"""What is taken from a batch."""

import numpy as np
import pytest

from megalard.data.batch import collate
from megalard.distill.terms.logits import chosen_rows
from megalard.parallel.mesh import Axis

LENGTH = 24
BLOCKS = [
    (np.arange(LENGTH), [(0, 5), (5, LENGTH)]),
    (np.arange(100, 100 + LENGTH), [(3, 9), (11, 12)]),
    (np.arange(200, 200 + LENGTH), [(0, LENGTH)]),
    (np.arange(300, 300 + LENGTH), []),
]


@pytest.mark.parametrize("last", [None, 1, 4, 7, LENGTH, LENGTH + 1])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_last_valid_tokens_of_each_block_are_chosen(last, ranks):
    found = []
    for rank in range(ranks):
        batch = collate(BLOCKS).cut(Axis(None, rank, ranks))
        found += batch.tokens_bs.flatten()[chosen_rows(batch, last)].tolist()
    expected = []
    for tokens, documents in BLOCKS:
        valid = [int(tokens[i]) for start, end in documents for i in range(start, end)]
        # a block with fewer gives what it has
        expected += valid if last is None or len(valid) < last else valid[-last:]
    assert sorted(found) == expected
