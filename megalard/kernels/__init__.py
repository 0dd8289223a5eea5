"""Namespace of the Triton kernels, which live in the repository's top-level ``kernels/``.

An installed wheel carries them inside this package; in a checkout they are found by appending
that folder to the package's path. Import them only as ``megalard.kernels.<name>``.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if _checkout.is_dir():
    __path__.append(str(_checkout))
