"""What a run prints: lines on rank 0, each written at once."""

from __future__ import annotations

from megalard.errors import printable


class Reporter:
    """Prints on rank 0 and is silent on other ranks.

    Args:
        is_rank_0: whether this rank prints.
    """

    def __init__(self, is_rank_0: bool):
        self.is_rank_0 = is_rank_0

    def line(self, text: str) -> None:
        """Print one line, in which control characters of names and files are escaped."""
        if self.is_rank_0:
            print(printable(text), flush=True)

    def warning(self, text: str) -> None:
        """Print one line about something that works but may not be intended."""
        self.line(f"warning: {text}")
