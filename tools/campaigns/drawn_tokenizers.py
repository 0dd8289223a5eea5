"""Small tokenizers of the kinds that model directories have."""

from __future__ import annotations

import json
from pathlib import Path

_CORPUS = [
    "the quick brown fox jumps over the lazy dog 1234567890",
    "pack my box with five dozen liquor jugs",
] * 50
_MARKS = ("<|im_start|>", "<|im_end|>")


def make_stock(folder: Path) -> None:
    """Write one directory per kind of tokenizer."""
    for name, make in (
        ("bytes", _bytes),
        ("bytes-bos", _bytes_with_bos),
        ("metaspace", _metaspace),
        ("sentencepiece", _sentencepiece),
        ("sentencepiece-added", _sentencepiece_with_added_tokens),
    ):
        (folder / name).mkdir(parents=True)
        make(folder / name)


def make_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one id per byte, an end token and a BOS, into a folder."""
    _bytes(folder)


def make_piece_tokenizer(folder: Path) -> None:
    """Write a sentencepiece tokenizer with added tokens, and no tokenizer.json, into a folder."""
    _sentencepiece_with_added_tokens(folder)


def _save(tokenizer, folder: Path, **config) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<s>"])
    return tokenizer


def _bytes(folder: Path) -> None:
    _save(_byte_level(), folder, eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast")


def _bytes_with_bos(folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = _byte_level()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 257)]
    )
    _save(tokenizer, folder, eos_token="</s>", bos_token="<s>", model_max_length=64)


def _metaspace(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", *_MARKS]
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=special)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    _save(tokenizer, folder, eos_token="<|im_end|>", unk_token="<unk>")


def train_sentencepiece(folder: Path) -> int:
    """Write tokenizer.model with byte fallback, as Llama has it; return its size."""
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(_CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
    )
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    model = str(folder / "tokenizer.model")
    return sentencepiece.SentencePieceProcessor(model_file=model).vocab_size()


def _sentencepiece(folder: Path) -> None:
    train_sentencepiece(folder)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _sentencepiece_with_added_tokens(folder: Path) -> None:
    size = train_sentencepiece(folder)
    added = {mark: size + number for number, mark in enumerate(_MARKS)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    tokens = [("<unk>", 0), ("<s>", 1), ("</s>", 2), *added.items()]
    decoder = {str(id): {"content": text, "special": True, **plain} for text, id in tokens}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": _MARKS[1],
        "unk_token": "<unk>",
        "added_tokens_decoder": decoder,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
