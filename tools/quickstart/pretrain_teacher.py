"""Train the teacher of the quickstart from a random start on the Python standard library.

    python -m tools.quickstart.pretrain_teacher --output runs/quickstart_teacher

The teacher is a Llama of 0.8M parameters with a native window of 256 tokens and a byte-level BPE of
512 ids. It is trained with transformers and torch alone on 41M tokens, ten times the text of
``tools.quickstart.stdlib_text``, which takes half an hour on two CPU cores. The teacher in
launch/quickstart_teacher was made with the default options and the library of Python 3.11.

At the end the script prints the held-out loss by length, with native positions and with positions
divided by 8, which is the scaling that the quickstart restores.
"""

from __future__ import annotations

import argparse
import sys

from megalard import cli
from tools import command_line


def main(arguments: list[str] | None = None) -> int:
    """Train the teacher; return the exit status."""
    options = parse(arguments)
    return cli.run(lambda: run(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_line.make_parser("tools.quickstart.pretrain_teacher", __doc__)
    at_least, above = command_line.at_least, command_line.above
    command_line.add_output(parser, "the model's directory, which must be new or empty")
    parser.add_argument("--steps", type=at_least(1), default=5000, metavar="N", help="steps")
    parser.add_argument(
        "--global-batch",
        type=at_least(1),
        default=32,
        metavar="N",
        help="rows of 256 tokens per step",
    )
    parser.add_argument(
        "--learning-rate",
        type=above(0, float),
        default=3e-3,
        metavar="RATE",
        help="the peak of the learning rate",
    )
    parser.add_argument(
        "--warmup-steps", type=at_least(0), default=200, metavar="N", help="steps of the warm-up"
    )
    command_line.add_seed(parser, "the initial weights and the order of the data")
    command_line.add_device(parser)
    parser.add_argument(
        "--log-every", type=at_least(1), default=200, metavar="N", help="steps between reports"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the training step, which needs a C++ compiler and doubles the speed",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Make the tokenizer, train the model, write both, and measure the model."""
    import torch

    from megalard.checkpoint.convert import check_target
    from megalard.parallel.mesh import pick_device
    from tools.quickstart import stdlib_text, teacher
    from tools.quickstart.byte_bpe import train_tokenizer

    check_target(options.output)
    device = pick_device(options.device, 0)
    torch.manual_seed(options.seed)
    texts = {
        split: [document["text"] for document in documents]
        for split, documents in stdlib_text.collect_splits().items()
    }
    tokenizer = train_tokenizer(texts["train"], teacher.VOCAB_SIZE, teacher.WINDOW)
    streams = {split: teacher.encode(tokenizer, documents) for split, documents in texts.items()}
    model = teacher.make_model(tokenizer.eos_token_id).to(device)
    sizes = ", ".join(f"{split} {len(stream):,}" for split, stream in streams.items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters on {device}; tokens: {sizes}", flush=True)

    teacher.train(model, streams, options)
    options.output.mkdir(parents=True, exist_ok=True)
    teacher.save(model, tokenizer, options.output)
    teacher.print_losses(options.output, streams["heldout"], device)


if __name__ == "__main__":
    sys.exit(main())
