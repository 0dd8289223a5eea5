"""Let a process of root be bound by permissions, like a process of any other user."""

from __future__ import annotations

import ctypes

_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2
_VERSION_3 = 0x20080522


def give_up_rights() -> None:
    """Make this process obey the permissions of files and directories from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for word in range(3):  # the effective, permitted and inheritable capabilities
        sets[word] &= ~(1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH)
    assert libc.capset(header, sets) == 0
