"""Train a byte-level BPE tokenizer, and save it as Hugging Face files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_DOCUMENT = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, window: int, single_digits: bool = False
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of ``vocab_size`` ids, of which id 0 is the end token.

    Args:
        window: stored as the tokenizer's ``model_max_length``.
        single_digits: give every digit a separate id, as Llama's tokenizers do, so that all numbers
            are spelled alike.
    """
    bpe = Tokenizer(models.BPE())
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if single_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizer])
    bpe.pre_tokenizer = pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_DOCUMENT,
        model_max_length=window,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, as transformers 4 and 5 read them."""
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # all that transformers 4 has
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
