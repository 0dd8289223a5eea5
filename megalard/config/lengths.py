"""Numbers of tokens as people write them: ``4096`` or ``4K``."""

from __future__ import annotations

from megalard.errors import UserError, shown

_DIGITS = 12


def parse_length(text: str, least: int = 2) -> int:
    """Return the number of tokens of a length such as ``4096`` or ``4K``, which is 4 * 1024.

    Raises:
        UserError: the text is not a length of at least ``least`` tokens.
    """
    number, unit = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    is_number = number.isascii() and number.isdecimal() and len(number) <= _DIGITS
    if not is_number or int(number) * unit < least:
        raise UserError(f"{shown(text)} is not a length: write tokens, as 4096 or 4K")
    return int(number) * unit
