"""The tokenizer of a model directory: text to the ids that transformers gives, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megalard.errors import UserError, reason_of, shown
from megalard.files.reading import cannot_read, check_if_regular, read_json
from megalard.quiet import quiet_transformers

# Any one of these files is enough to load a tokenizer from.
_DEFINING_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
# The largest vocabularies have some 300,000 ids.
_LARGEST_ID = 2**24
# The suffixes of all files that a tokenizer may be loaded from.
_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")


@dataclass(frozen=True)
class Tokenizer:
    """A function from text to ids, and its inverse.

    Attributes:
        directory: where it was loaded from.
        encode_batch: converts a list of texts to a list of id lists. It adds no special token and
            truncates nothing. A special token that is spelled out in a text becomes its id.
        decode: converts ids to text and leaves special tokens out.
        starts_with, ends_with: the ids that the tokenizer puts before and after a text.
        bos_id: the BOS id; None if the tokenizer has none.
        eos_id: the EOS id, with which blocks are padded.
        vocabulary: token to id.
        vocab_size: one more than the largest id that the tokenizer returns.
        fingerprint: a sha256, in hexadecimal, of everything that determines the ids.
        file_fingerprint: the sha256 of the defining file. Earlier versions recorded this one.
        chat_template: the chat template; None if the tokenizer has none.
        render_chat: converts a list of messages to the text that the chat template makes of it.
    """

    directory: Path
    encode_batch: Callable[[list[str]], list[list[int]]]
    decode: Callable[[Sequence[int]], str]
    starts_with: tuple[int, ...]
    ends_with: tuple[int, ...]
    bos_id: int | None
    eos_id: int
    vocab_size: int
    vocabulary: dict[str, int] = field(repr=False)
    fingerprint: str
    file_fingerprint: str
    chat_template: str | None = field(default=None, repr=False)
    render_chat: Callable[[list[dict]], str] | None = None

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Whether a recorded fingerprint is of this tokenizer."""
        return fingerprint in (self.fingerprint, self.file_fingerprint)

    def id_of(self, token: str) -> int:
        """Return the id of a token.

        Raises:
            UserError: the vocabulary does not have it.
        """
        if token not in self.vocabulary:
            raise UserError(
                f"the tokenizer in {self.directory} has no token {shown(token)}: choose one of "
                "its vocabulary"
            )
        return self.vocabulary[token]


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """Load the tokenizer that ``AutoTokenizer`` loads from a directory.

    A directory with ``tokenizer.json`` alone, which ``AutoTokenizer`` does not read, is accepted
    too. Python code in the directory is never run.

    Raises:
        UserError: the directory has no tokenizer, it is damaged, or no end token is named.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise UserError(f"model directory {model_dir} does not exist: check its spelling")
    if not has_tokenizer(model_dir):
        raise UserError(
            f"model directory {model_dir} has neither tokenizer.json nor tokenizer.model: "
            "copy the model's tokenizer there"
        )
    _check_files(model_dir)
    _check_ids(model_dir)
    tokenizer = _load(model_dir)
    vocabulary = tokenizer.get_vocab()
    vocab_size = max(vocabulary.values(), default=-1) + 1
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        eos_id = _eos_of_config(model_dir)
    if eos_id is None or not 0 <= eos_id < vocab_size:
        raise UserError(
            f"the tokenizer in {model_dir} has no end token (eos id {eos_id} of {vocab_size} ids): "
            "name eos_token in tokenizer_config.json or eos_token_id in config.json"
        )
    starts_with, ends_with = _around(tokenizer)
    return Tokenizer(
        directory=model_dir,
        encode_batch=_encoder(tokenizer),
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        render_chat=lambda chat: str(tokenizer.apply_chat_template(chat, tokenize=False)),
        chat_template=_chat_template(tokenizer),
        starts_with=starts_with,
        ends_with=ends_with,
        bos_id=tokenizer.bos_token_id,
        eos_id=eos_id,
        vocab_size=vocab_size,
        vocabulary=vocabulary,
        fingerprint=_fingerprint(tokenizer, model_dir),
        file_fingerprint=_file_fingerprint(model_dir),
    )


def has_tokenizer(model_dir: Path) -> bool:
    """Whether a directory has the files of a tokenizer."""
    return any((model_dir / name).is_file() for name in _DEFINING_FILES[:3])


def _check_files(model_dir: Path) -> None:
    """Refuse a named pipe or a device among the files that transformers may open."""
    try:
        for path in sorted(model_dir.iterdir()):
            if path.suffix in _SUFFIXES and not path.is_dir():
                check_if_regular(path)
    except OSError as error:
        raise cannot_read(model_dir, error) from None


def _check_ids(model_dir: Path) -> None:
    """Refuse ids for which the library of tokenizers would take gigabytes, one entry per id."""
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json"):
        try:
            content = read_json(model_dir / name)
        except (OSError, ValueError):
            continue  # transformers names what is wrong, or does not need the file
        for token, id in _ids_of(name, content):
            if isinstance(id, int) and abs(id) > _LARGEST_ID:
                raise UserError(
                    f"{model_dir / name} gives the token {shown(token)} the id {shown(id)}, more "
                    "than a vocabulary has: copy the tokenizer's files again"
                )


def _ids_of(name: str, content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the tokens and ids of a file of a tokenizer."""
    if not isinstance(content, dict):
        return
    vocabulary = content
    if name == "tokenizer.json":
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else {}
        added = content.get("added_tokens")
        for token in added if isinstance(added, list) else ():
            if isinstance(token, dict):
                yield token.get("content"), token.get("id")
    elif name == "tokenizer_config.json":
        added = content.get("added_tokens_decoder")
        for id in added if isinstance(added, dict) else ():
            yield id, int(id) if id.isascii() and id.isdecimal() and len(id) < 100 else None
        return
    yield from vocabulary.items() if isinstance(vocabulary, dict) else ()


def _load(model_dir: Path) -> PreTrainedTokenizerBase:
    needs_no_class = (model_dir / "tokenizer.json").is_file()
    has_class = (model_dir / "config.json").is_file() or "tokenizer_class" in _config_of(model_dir)
    loader: Any = PreTrainedTokenizerFast if needs_no_class and not has_class else AutoTokenizer
    try:
        with quiet_transformers():
            return loader.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    # The parser of tokenizer.json, which is written in Rust, raises bare Exceptions.
    except Exception as error:
        reason = reason_of(error, 300)
        raise UserError(
            f"the tokenizer in {model_dir} cannot be loaded by transformers "
            f"({reason}): copy its files again, or add tokenizer.json"
        ) from None


def _config_of(model_dir: Path) -> dict:
    try:
        config = json.loads((model_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # The file may ask for truncation or padding, which are meant for inference.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))

    def encode_batch(texts: list[str]) -> list[list[int]]:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    return encode_batch


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    return (), ()


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that is used without tools; a tokenizer may have several."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _fingerprint(tokenizer: PreTrainedTokenizerBase, model_dir: Path) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # None of these changes the ids of a text that is encoded without special tokens.
        for key in ("truncation", "padding", "post_processor", "decoder"):
            content.pop(key, None)
        content["split_special_tokens"] = backend.encode_special_tokens
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    added = {str(id): str(token) for id, token in tokenizer.added_tokens_decoder.items()}
    text = json.dumps([_file_fingerprint(model_dir), added, type(tokenizer).__name__])
    return hashlib.sha256(text.encode()).hexdigest()


def _file_fingerprint(model_dir: Path) -> str:
    path = next(p for name in _DEFINING_FILES if (p := model_dir / name).is_file())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _eos_of_config(model_dir: Path) -> int | None:
    """Return ``eos_token_id`` of config.json or generation_config.json, the first of a list."""
    for name in ("config.json", "generation_config.json"):
        try:
            eos_id = json.loads((model_dir / name).read_text(encoding="utf-8"))["eos_token_id"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(eos_id, list):
            eos_id = eos_id[0] if eos_id else None
        if type(eos_id) is int:
            return eos_id
    return None
