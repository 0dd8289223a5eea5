"""The windows, lengths and tasks of the study, and how much is measured."""

from __future__ import annotations

from dataclasses import dataclass, fields

NATIVE_WINDOW, FACTOR = 512, 8
STUDENT_WINDOW = NATIVE_WINDOW * FACTOR
ROPES = ("linear", "yarn")
# Short text: windows of these lengths, in tokens.
SHORT_LENGTHS = (NATIVE_WINDOW // 4, NATIVE_WINDOW // 2, NATIVE_WINDOW)
# Long text: edges of the intervals of positions in windows of the student's length.
EDGES = (1, 64, 128, 256, 512, 1024, 1536, 2048, 2560, 3072, 3584, 4096)
TASKS = ("passkey", "multi_key")
TASK_LENGTHS = (NATIVE_WINDOW, 2 * NATIVE_WINDOW, 4 * NATIVE_WINDOW, STUDENT_WINDOW)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        validation: tokens per length on validation text, for a search of learning rates.
        milestone: tokens per domain and length, at each point of a curve.
        short: tokens per domain and length, where methods are compared.
        long: tokens per domain in windows of the student's length.
        samples: samples per task, length and depth.
    """

    validation: int = 32_768
    milestone: int = 16_384
    short: int = 65_536
    long: int = 131_072
    samples: int = 8

    def divided_by(self, divisor: int) -> Sizes:
        """Return smaller sizes, each of which is at least 1."""
        sizes = (getattr(self, field.name) for field in fields(self))
        return Sizes(*(max(1, size // divisor) for size in sizes))
