"""Warnings of transformers are off within a block, and as before after it."""

from __future__ import annotations

import logging

import pytest
from transformers.utils import logging as transformers_logging

from megalard.quiet import quiet_transformers


def test_warnings_are_off_within_the_block():
    logger = logging.getLogger("transformers.some_module")
    before = transformers_logging.get_verbosity()
    with quiet_transformers():
        assert not logger.isEnabledFor(logging.ERROR)
    assert transformers_logging.get_verbosity() == before
    with pytest.raises(KeyError), quiet_transformers():
        raise KeyError
    assert transformers_logging.get_verbosity() == before
