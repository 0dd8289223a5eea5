"""The shapes of models that benchmarks know by name, in the keys of ``config.json``."""

from __future__ import annotations

import argparse


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


SHAPES = {
    "tiny": _shape(256, 688, 4, 4, 4, 1000),
    "tiny-grouped": _shape(256, 688, 4, 4, 2, 1000),
    "llama-1b": _shape(2048, 5632, 22, 16, 16, 32000),
    "llama2-7b": _shape(4096, 11008, 32, 32, 32, 32000),
    "llama3-8b": _shape(4096, 14336, 32, 32, 8, 128256),
    "llama2-70b": _shape(8192, 28672, 80, 64, 8, 32000),
}


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Declare ``--shape``."""
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), default="llama2-7b", help="the shape of the model"
    )
