"""The models of the parity cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.cases import ALL_CASES, make_models


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with the models of every parity case."""
    folder = tmp_path_factory.mktemp("parity")
    for name, case in ALL_CASES.items():
        make_models(case, folder / name)
    return folder
