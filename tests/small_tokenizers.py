"""Tokenizers that are made on the fly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tokenizers import Tokenizer as Bpe
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megalard.data.tokenizer import Tokenizer

EOS = 256
CORPUS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 20


def make_byte_tokenizer(
    eos_id: int = EOS,
    vocab_size: int = EOS + 1,
    name: str = "bytes",
    starts_with: tuple[int, ...] = (),
    bos_id: int | None = None,
) -> Tokenizer:
    """Return a tokenizer whose ids are UTF-8 bytes, so that stored ids can be read by eye.

    It puts the end token after a text.
    """
    fingerprint = hashlib.sha256(name.encode()).hexdigest()
    return Tokenizer(
        directory=Path("/byte-tokenizer"),
        encode_batch=lambda texts: [list(text.encode()) for text in texts],
        decode=lambda ids: bytes(i for i in ids if i < EOS).decode(),
        starts_with=starts_with,
        ends_with=(eos_id,),
        bos_id=bos_id,
        eos_id=eos_id,
        vocab_size=vocab_size,
        vocabulary={"</s>": eos_id, **{chr(i): i for i in range(128)}},
        fingerprint=fingerprint,
        file_fingerprint=f"file of {fingerprint}",
    )


def save_byte_tokenizer(folder: Path) -> None:
    """Write the files of a tokenizer with one id per byte, and ``</s>`` = 256 as the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"</s>": len(alphabet)}
    tokenizer = Bpe(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def save_fast_tokenizer(folder: Path, config: dict | None = None, **tokenizer_config) -> Path:
    """Write a BPE tokenizer whose file asks for added tokens, truncation and padding.

    Args:
        config: the content of ``config.json``, if any.
        tokenizer_config: the content of ``tokenizer_config.json``.
    """
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.enable_truncation(4)
    bpe.enable_padding(length=8, pad_id=1, pad_token="</s>")
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
