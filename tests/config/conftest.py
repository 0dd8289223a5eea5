"""A function that writes YAML files."""

from __future__ import annotations

import pytest


@pytest.fixture
def write(tmp_path):
    """A function that writes a YAML file and returns its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write
