"""Make Triton's interpreter faster when this module is imported.

Two habits of the interpreter take half of the time of the kernel tests. At every call of a device
function it looks through all members of ``triton.language`` for functions to replace; here it looks
once. It computes every sum and product of 32-bit integers a second time in 64 bits, to assert that
they do not overflow, which the few rows of a test cannot do.
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache

from triton.language.core import is_builtin
from triton.runtime import interpreter


@cache
def _builtins(package: object) -> list[str]:
    """Return the names of the functions to replace, of a package or class that has them all."""
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def _patch_builtin(package: object, builder: object, scope: object) -> None:
    for name in _builtins(package):
        member = getattr(package, name)
        # In a device function the functions of its caller are replaced already.
        if is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_builtin = _patch_builtin
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
