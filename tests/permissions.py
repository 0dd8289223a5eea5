"""Being somebody who is not root, for a process that is."""

from __future__ import annotations

import ctypes


def give_up_rights() -> None:
    """This process no longer passes over the permissions of files and directories."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for word in range(3):  # effective, permitted, inheritable
        sets[word] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
