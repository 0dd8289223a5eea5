"""Documents of conversations, which the model's chat template writes as text."""

from __future__ import annotations

from megalard.data.boundaries import Boundaries, Choice, boundaries_of
from megalard.data.formats import Column, text_column
from megalard.data.tokenizer import Tokenizer
from megalard.errors import UserError

# A chat is under the key messages if data.text_key has its default, text.
_TEXT_KEY, _MESSAGES_KEY = "text", "messages"


def column_of(kind: str, key: str, tokenizer: Tokenizer) -> Column:
    """Return where lines and rows have their document.

    Args:
        kind: ``text`` or ``chat``, as ``data.format``.
        key: ``data.text_key``. For a chat the default ``text`` stands for ``messages``.

    Raises:
        UserError: a chat is asked for, and the tokenizer has no chat template.
    """
    if kind == "text":
        return text_column(key)
    if tokenizer.chat_template is None:
        raise UserError(
            f"data.format is chat, but the tokenizer in {tokenizer.directory} has no chat "
            "template: add chat_template.jinja, or give text"
        )

    def conversation(value: object, where: str) -> str:
        if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
            raise UserError(
                f"{where} has a {type(value).__name__}: it must be a list of messages, each with "
                "role and content"
            )
        # A template may raise any error, of its own or of jinja.
        try:
            return tokenizer.render_chat(value)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"{where} does not fit the chat template ({reason}): correct or remove it"
            ) from error

    chosen = _MESSAGES_KEY if key == _TEXT_KEY else key
    return Column(chosen, conversation, tokenizer.chat_template)


def boundaries_of_format(
    kind: str, tokenizer: Tokenizer, bos: Choice, eos: Choice, end_token: str | None
) -> Boundaries:
    """Return the special tokens around documents, as ``boundaries_of``.

    A chat template writes the special tokens itself, so ``auto`` adds nothing to a chat.
    """
    if kind == "chat":
        bos, eos = ("no" if choice == "auto" else choice for choice in (bos, eos))
    return boundaries_of(tokenizer, bos, eos, end_token)
