"""Read numpy's .npy files, in which anything but plain numbers is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from megalard.files.reading import check_regular


def read_array(path: str | Path, **options: Any) -> np.ndarray:
    """Return the array of a .npy file. Nothing is unpickled.

    Args:
        options: as for ``numpy.load``.

    Raises:
        UserError: the path is not a regular file.
        OSError: the file cannot be read.
        ValueError: the file does not hold an array of numbers, or not all of it.
    """
    check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about headers that are refused below
            array = np.load(path, allow_pickle=False, **options)
    except (OSError, ValueError):
        raise
    # The header is a Python literal: the parser, the tokenizer and the sizes raise errors of all
    # kinds, MemoryError among them.
    except Exception as error:
        raise ValueError(f"its header cannot be read: {type(error).__name__}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError("it is an archive and not one array")
    return array
