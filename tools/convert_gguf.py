"""Make a Hugging Face directory from a GGUF file that transformers can read.

  python -m tools.convert_gguf MODEL.gguf MODEL_DIR

The weights are stored in fp32, because small changes by LoRA would be rounded away in bf16. A GGUF
file has the name of the pre-tokenizer, but not the pre-tokenizer itself. Where the name is known,
the pre-tokenizer is restored. The package gguf must be installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megalard import cli
from megalard.errors import UserError, reason_of
from megalard.quiet import quiet_transformers


def convert(file: Path, output: Path) -> None:
    """Write the directory.

    Raises:
        UserError: the file cannot be read, or the directory is not empty.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file: give a .gguf file")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty: choose another directory")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("the package gguf is not installed: pip install gguf") from None
    model, tokenizer = _read(file)
    name = GGUFReader(str(file)).get_field("tokenizer.ggml.pre")
    _restore_pre_tokenizer(tokenizer.backend_tokenizer, "" if name is None else name.contents())
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{output}: {model.config.model_type}, {parameters:,} parameters in fp32")


def _read(file: Path) -> tuple[Any, Any]:
    """Return the model without its quantization settings, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": file.name}
    try:
        with quiet_transformers():
            quantized = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    except Exception as error:  # transformers and gguf raise many kinds for an unreadable file
        reason = reason_of(error, 300)
        raise UserError(f"transformers cannot read {file} ({reason}): give another file") from None
    settings = quantized.config.to_dict()
    for key in ("quantization_config", "unk_token_id", "_name_or_path"):
        settings.pop(key, None)
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return model, tokenizer


def _restore_pre_tokenizer(backend: Any, name: str) -> None:
    """Restore the pre-tokenizer that the GGUF file names, unless it is plain byte level."""
    from tokenizers import pre_tokenizers

    if name == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def main(arguments: list[str] | None = None) -> int:
    """Convert the file that the arguments name; return the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="MODEL.gguf", help="the file to read")
    parser.add_argument("output", type=Path, metavar="MODEL_DIR", help="new or empty directory")
    options = parser.parse_args(arguments)
    return cli.run(lambda: convert(options.file, options.output))


if __name__ == "__main__":
    sys.exit(main())
