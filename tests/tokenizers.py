"""Tokenizers made on the fly."""

import hashlib
import json

from tokenizers import Tokenizer as Bpe
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megalard.data.tokenizer import Tokenizer

EOS = 256


def make_byte_tokenizer(eos_id: int = EOS, vocab_size: int = EOS + 1, name: str = "bytes"):
    """Ids are UTF-8 bytes, so that a test can tell by eye what was stored."""
    return Tokenizer(
        encode_batch=lambda texts: [list(text.encode()) for text in texts],
        decode=lambda ids: bytes(i for i in ids if i < EOS).decode(),
        eos_id=eos_id,
        vocab_size=vocab_size,
        fingerprint=hashlib.sha256(name.encode()).hexdigest(),
        files=(),
    )


CORPUS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 20


def save_fast(folder, config=None, **tokenizer_config):
    """A BPE tokenizer with every trap set: a template that adds tokens, truncation, padding."""
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
