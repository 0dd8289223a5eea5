"""The special tokens that are put before and after each document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megalard.data.tokenizer import Tokenizer
from megalard.errors import UserError

Choice = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class Boundaries:
    """The ids that are put before and after each document, and before each window of text.

    Attributes:
        before: usually the BOS id, or nothing.
        after: usually the end id, or nothing.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def around(self, ids: list[int]) -> list[int]:
        """Return the ids of a document with the special tokens."""
        return [*self.before, *ids, *self.after]


def boundaries_of(
    tokenizer: Tokenizer, bos: Choice = "auto", eos: Choice = "auto", end_token: str | None = None
) -> Boundaries:
    """Return the special tokens for a tokenizer and the choices of a user.

    Args:
        bos, eos: ``auto`` puts what the tokenizer itself puts around a text (``add_bos_token``,
            ``add_eos_token`` or its post-processor); ``yes`` puts the BOS or the end token, and
            ``no`` puts nothing.
        end_token: the text of the end token for ``eos`` yes; None takes the tokenizer's EOS token.

    Raises:
        UserError: a token is asked for that the tokenizer does not have.
    """
    if bos == "yes" and tokenizer.bos_id is None:
        raise UserError(
            f"data.bos is yes, but the tokenizer in {tokenizer.directory} has no BOS token: leave "
            "data.bos out, or name bos_token in tokenizer_config.json"
        )
    if end_token is not None and eos != "yes":
        raise UserError(f"data.end_token {end_token} is given, so data.eos must be yes, not {eos}")
    before = {"auto": tokenizer.starts_with, "yes": (tokenizer.bos_id,), "no": ()}[bos]
    end_id = tokenizer.eos_id if end_token is None else tokenizer.id_of(end_token)
    after = {"auto": tokenizer.ends_with, "yes": (end_id,), "no": ()}[eos]
    return Boundaries(before, after)
