"""transformers 4.57, which reads exported students in a process of its own.

It cannot be in one environment with version 5. ``tests/run.sh`` installs it next to the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / ".transformers-4.57"

_PROGRAM = """
import sys
import torch, transformers
assert transformers.__version__.startswith("4.57."), transformers.__version__
path, *folders = sys.argv[1:]
texts, logits = torch.load(path), {}
for folder in folders:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits[folder] = [model(text, use_cache=False).logits for text in texts]
torch.save(logits, path)
"""


def logits_of_transformers_4(
    folders: Sequence[Path], texts: Sequence[torch.Tensor], path: Path
) -> dict[Path, list[torch.Tensor]]:
    """Return the logits of some texts for each model directory, in float64.

    Args:
        texts: token ids, int64 [b, s] each.
        path: a file for the exchange with the process.
    """
    if not FOLDER.is_dir():
        pytest.skip("transformers 4.57 is not installed next to the tests: run tests/run.sh")
    torch.save(list(texts), path)
    subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(path), *map(str, folders)],
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
        check=True,
        timeout=300,
    )
    return {Path(folder): logits for folder, logits in torch.load(path).items()}
