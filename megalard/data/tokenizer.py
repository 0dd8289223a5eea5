"""The tokenizer of a model directory: text to ids, without special tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizerFast

from megalard.errors import UserError

# The files that others need in order to load the same tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Tokenizer:
    """A function from text to ids, and its inverse.

    Attributes:
        encode_batch: converts a list of texts to a list of id lists. It adds no special token and
            truncates nothing.
        decode: converts ids to text and leaves special tokens out.
        eos_id: the id that is written after each document.
        vocab_size: one more than the largest id that the tokenizer returns.
        fingerprint: the sha256, in hexadecimal, of the file that defines the encoding.
        files: the files to copy next to an exported model.
    """

    encode_batch: Callable[[list[str]], list[list[int]]]
    decode: Callable[[Sequence[int]], str]
    eos_id: int
    vocab_size: int
    fingerprint: str
    files: tuple[Path, ...]


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """Load ``tokenizer.json`` or, if there is none, a sentencepiece ``tokenizer.model``.

    ``tokenizer.json`` is used as it is written. The classes of transformers for model families,
    which may replace parts of it, are not consulted, and Python code in the directory is never run.

    Raises:
        UserError: the directory or both files are missing, the file is damaged, or no end token is
            named.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise UserError(f"model directory {model_dir} does not exist: check its spelling")
    if (model_dir / "tokenizer.json").is_file():
        return _load_fast(model_dir)
    if (model_dir / "tokenizer.model").is_file():
        return _load_sentencepiece(model_dir)
    raise UserError(
        f"model directory {model_dir} has neither tokenizer.json nor tokenizer.model: "
        "copy the model's tokenizer there"
    )


def _load_fast(model_dir: Path) -> Tokenizer:
    path = model_dir / "tokenizer.json"
    try:
        fast = PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True)
    # The parser, which is written in Rust, raises bare Exceptions.
    except Exception as error:
        raise UserError(f"{path} cannot be read as a tokenizer ({error}): copy it again") from error
    backend = fast.backend_tokenizer
    # The file may ask for truncation or padding, which are meant for inference.
    backend.no_truncation()
    backend.no_padding()

    def encode_batch(texts: list[str]) -> list[list[int]]:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    return _finish(
        model_dir,
        path,
        encode_batch,
        lambda ids: fast.decode(list(ids), skip_special_tokens=True),
        fast.eos_token_id,
        max(fast.get_vocab().values(), default=-1) + 1,
    )


def _load_sentencepiece(model_dir: Path) -> Tokenizer:
    path = model_dir / "tokenizer.model"
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as a sentencepiece model: copy it again, or add tokenizer.json"
        ) from error
    return _finish(
        model_dir,
        path,
        lambda texts: pieces.encode(texts, out_type=int, add_bos=False, add_eos=False),
        lambda ids: pieces.decode(list(ids)),
        pieces.eos_id() if pieces.eos_id() >= 0 else None,
        pieces.vocab_size(),
    )


def _finish(model_dir, path, encode_batch, decode, eos_id, vocab_size) -> Tokenizer:
    if eos_id is None:
        eos_id = _eos_of_config(model_dir)
    if eos_id is None or not 0 <= eos_id < vocab_size:
        raise UserError(
            f"the tokenizer in {model_dir} has no end token (eos id {eos_id} of {vocab_size} ids): "
            "name eos_token in tokenizer_config.json or eos_token_id in config.json"
        )
    return Tokenizer(
        encode_batch=encode_batch,
        decode=decode,
        eos_id=eos_id,
        vocab_size=vocab_size,
        fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
        files=tuple(file for name in TOKENIZER_FILES if (file := model_dir / name).is_file()),
    )


def _eos_of_config(model_dir: Path) -> int | None:
    """Return ``eos_token_id`` of config.json, the first of a list; None if there is none."""
    try:
        eos_id = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(eos_id, list):
        eos_id = eos_id[0] if eos_id else None
    return eos_id if isinstance(eos_id, int) else None
