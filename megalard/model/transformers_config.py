"""Read a ``config.json`` with the configuration classes of transformers.

transformers decides which class reads a file, what a missing key means and which values do not fit
together. Reading through its classes gives the same defaults and the same refusals.
"""

from __future__ import annotations

import copy
import json
import tempfile
from functools import lru_cache
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from megalard.errors import UserError, reason_of
from megalard.quiet import quiet_transformers


def as_transformers_reads(config: dict, where: str) -> PretrainedConfig:
    """Return the configuration object that ``AutoConfig`` makes of a ``config.json``.

    Args:
        config: the content of the file. Code that it names in ``auto_map`` is not run.
        where: the directory of the file, for errors.

    Raises:
        UserError: transformers refuses the file.
    """
    try:
        # The caller may change what it gets.
        return copy.deepcopy(_read(json.dumps(config)))
    # What is tried is code of transformers alone, which raises errors of all kinds at odd values.
    except Exception as error:
        reason = reason_of(error, 300)
        raise UserError(
            f"{where}/config.json is refused by transformers ({reason}): correct "
            "it, or download it again"
        ) from None


@lru_cache(maxsize=8)
def _read(text: str) -> PretrainedConfig:
    """Return what transformers reads from a file; a run asks a dozen times for the same content."""
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(text)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        # A model repeats this call, after which a key next to the RoPE section has priority.
        config.standardize_rope_params()
    return config
