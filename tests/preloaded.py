"""What the server of ``tests/ranks.py`` imports before it forks the first rank.

The garbage collector is off during the imports, and ignores the imported objects later. Otherwise
every full collection in a forked rank would visit half a million objects and copy their pages.
That would take 0.4 of the 2.4 CPU seconds of a run of eight steps.
"""

from __future__ import annotations

import gc
import importlib
import os
from contextlib import suppress

MODULES = (
    "pytest",
    "megalard.train",
    "megalard.commands.train",
    "megalard.commands.convert",
    "megalard.evaluation.comparison",
    "tests.models",
    *(["tests.quick_interpreter"] if os.environ.get("TRITON_INTERPRET") else []),
    "torch.utils.tensorboard",
    # Without this list a rank would import these at their first use, which takes two seconds.
    "torch._inductor",
    "transformers.models.llama.modeling_llama",
    "megalard.training.board",
)

gc.disable()
for name in MODULES:
    # The rank that needs the module reports that it is missing.
    with suppress(ImportError):
        importlib.import_module(name)
gc.freeze()
gc.enable()
