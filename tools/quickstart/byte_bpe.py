"""Training a byte-level BPE tokenizer and saving it as a Hugging Face folder; used by two tools."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_DOCUMENT = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, context_length: int, single_digits: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab_size`` pieces whose piece 0 is the end-of-document token.

    Args:
        context_length: noted as the tokenizer's ``model_max_length``.
        single_digits: give every digit a piece of its own, as Llama's tokenizers do, so that any
            number is spelt alike.
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
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` that transformers 4 and 5 read."""
    tokenizer.save_pretrained(folder)
    # transformers 4 knows no other class
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
