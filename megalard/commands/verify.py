"""Compare two models: tensors (names, shapes, dtypes, bits) and, on request, logits.

  megalard verify MODEL_DIR CHECKPOINT
  megalard verify RUN/student RUN/checkpoints/step-000144
  megalard verify ADAPTER_DIR RUN/student --base MODEL_DIR --logits text.txt

Each of the two may be a Hugging Face directory, a sharded checkpoint, a run's checkpoint or a PEFT
adapter; the last two are merged into their base model as they are read. Recorded checksums are
compared too. For --logits the text is read with A's tokenizer (in its directory or its base), or
with B's if A has none. The exit status is 0 if the models are the same, 1 if they differ, and 2 if
they could not be compared, for whatever reason.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from megalard.errors import UserError, printable

NAME, HELP = "verify", "compare two models bit for bit, and their logits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    from megalard.commands import tokens

    parser.add_argument("a", type=Path, metavar="A", help="model, checkpoint or adapter directory")
    parser.add_argument("b", type=Path, metavar="B", help="the directory to compare with A")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="base model of a run's checkpoint or an adapter, if it has moved",
    )
    parser.add_argument(
        "--logits",
        type=Path,
        metavar="TEXT",
        help="also compare logits on this .txt, .md, .py or .jsonl file, in fp32, with the "
        "trainer's decoder; needs the memory of one model at a time",
    )
    parser.add_argument(
        "--tokens",
        type=tokens,
        default=512,
        metavar="N",
        help="tokens of the text to read, 1 or more (default: 512)",
    )
    parser.add_argument(
        "--tolerance",
        type=_at_least_0(float),
        default=1e-5,
        metavar="X",
        help="largest |a - b| / |a| of the logits that counts as the same (default: 1e-5)",
    )
    parser.add_argument(
        "--logits-only",
        action="store_true",
        help="report differences of tensors, but let the logits alone decide",
    )
    parser.add_argument(
        "--lines",
        type=_at_least_0(int),
        default=20,
        metavar="N",
        help="differences to print (default: 20)",
    )


def _at_least_0(kind: type):
    def parse(text: str):
        value = kind(text)
        if not value >= 0:
            raise argparse.ArgumentTypeError(f"{text}: give 0 or more")
        return value

    return parse


def run(options: argparse.Namespace) -> int:
    """Compare; the exit status 1 is reserved for models that differ."""
    try:
        return 0 if _verify(options) else 1
    except UserError as error:
        print(f"megalard: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        sentence = f"cannot read or write{name}: {error.strerror or error}"
        print(printable(f"megalard: error: {sentence}"), file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 2


def _verify(options: argparse.Namespace) -> bool:
    from megalard.checkpoint import compare
    from megalard.checkpoint.open import open_model
    from megalard.checkpoint.weights import size_of
    from megalard.progress import byte_bar

    if options.logits_only and options.logits is None:
        raise UserError("--logits-only needs --logits TEXT")
    a, b = (open_model(path, options.base) for path in (options.a, options.b))
    models = [a, b]
    # The text is read before the tensors, which may take hours.
    text = options.logits
    tokens = None if text is None else compare.read_tokens(models, text, options.tokens)
    checked_bytes = sum(model.checked_bytes() for model in models)
    if checked_bytes:
        with byte_bar("checksums", checked_bytes) as advance:
            for model in models:
                model.check_sums(progress=advance)
    with byte_bar("tensors", size_of(a.weights)) as advance:
        lines = compare.tensor_differences(a, b, advance)
    for line in lines[: options.lines]:
        print(printable(line))
    if len(lines) > options.lines:
        print(f"and {len(lines) - options.lines} more")
    names = [printable(f"{model.directory} ({model.kind})") for model in models]
    count = len(a.weights.names())
    print(f"{names[0]} and {names[1]}: ", end="")
    print(f"{len(lines)} tensors differ" if lines else f"{count} tensors, every bit the same")
    is_same = not lines
    if tokens is not None:
        difference = compare.logits_difference(a, b, tokens)
        is_close = difference.relative <= options.tolerance
        is_same = is_close and (is_same or options.logits_only)
        print(
            f"logits on {difference.tokens} tokens: |a - b| / |a| = {difference.relative:.2e}, at "
            f"most {difference.largest:.2e}, KL(a || b) = {difference.kl:.2e}, the same most "
            f"likely token for {difference.agreement:.2%}: "
            f"{'the same' if is_close else 'different'}"
        )
    return is_same
