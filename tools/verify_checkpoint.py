"""Compares two models: the same tensors (names, shapes, dtypes, bits), and on request the logits.

    python tools/verify_checkpoint.py MODEL_DIR CHECKPOINT
    python tools/verify_checkpoint.py RUN/student RUN/checkpoints/step-000144
    python tools/verify_checkpoint.py ADAPTER_DIR RUN/student --base MODEL_DIR --logits text.txt

Each of the two may be a Hugging Face directory, a sharded checkpoint, a run's checkpoint or a PEFT
adapter; the last two are merged into their base model as they are read. Recorded checksums are
compared as well. For --logits the text is read by A's tokenizer (its own, or its base model's), or
by B's where A has none. Exit status: 0 the same, 1 different, 2 they could not be compared, for
whatever reason.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A", help="model, checkpoint or adapter directory")
    parser.add_argument("b", type=Path, metavar="B", help="the other one")
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
        help="also compare the logits on this .txt, .md, .py or .jsonl file, in fp32, by the "
        "trainer's decoder; needs the memory of one model at a time",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=512,
        metavar="N",
        help="tokens of it to read, 1 or more (default: 512)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="X",
        help="largest |a - b| / |a| of the logits that counts as the same (default: 1e-5)",
    )
    parser.add_argument(
        "--logits-only",
        action="store_true",
        help="tell the differences of the tensors, but let the logits alone decide",
    )
    parser.add_argument(
        "--lines", type=int, default=20, metavar="N", help="differences to print (default: 20)"
    )
    options = parser.parse_args(arguments)
    if options.lines < 0:
        parser.error(f"--lines {options.lines}: give 0 or more")
    if not options.tolerance >= 0:
        parser.error(f"--tolerance {options.tolerance}: give 0 or more")
    return options


def verify(options: argparse.Namespace) -> bool:
    # Imported late: --help should not wait for torch and transformers.
    from megalard.checkpoint import compare
    from megalard.checkpoint.convert import size_of
    from megalard.checkpoint.open import open_model
    from megalard.errors import UserError
    from megalard.progress import progress_bar

    if options.logits_only and options.logits is None:
        raise UserError("--logits-only needs --logits TEXT")
    models = [open_model(path, options.base) for path in (options.a, options.b)]
    # before the tensors, which may take hours
    text = options.logits
    tokens = None if text is None else compare.read_tokens(models, text, options.tokens)
    checked = sum(model.checked_bytes() for model in models)
    if checked:
        with progress_bar("checksums", checked) as advance:
            for model in models:
                model.check_sums(progress=advance)
    with progress_bar("tensors", size_of(models[0].weights)) as advance:
        lines = compare.tensor_differences(*models, advance)
    for line in lines[: options.lines]:
        print(line)
    if len(lines) > options.lines:
        print(f"and {len(lines) - options.lines} more")
    kinds = [f"{model.directory} ({model.kind})" for model in models]
    count = len(models[0].weights.names())
    print(f"{kinds[0]} and {kinds[1]}: ", end="")
    print(f"{len(lines)} tensors differ" if lines else f"{count} tensors, every bit the same")
    same = not lines
    if tokens is not None:
        found = compare.logits_difference(*models, tokens)
        close = found.relative <= options.tolerance
        same = close and (same or options.logits_only)
        print(
            f"logits on {found.tokens} tokens: |a - b| / |a| = {found.relative:.2e}, at most "
            f"{found.largest:.2e}, KL(a || b) = {found.kl:.2e}, the same first choice for "
            f"{found.agreement:.2%}: {'the same' if close else 'different'}"
        )
    return same


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from megalard.errors import UserError

    try:
        return 0 if verify(options) else 1
    except UserError as error:
        print(f"megalard: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:  # Python's own exit status would be 1, which says that they differ
        traceback.print_exc()
        return 2


if __name__ == "__main__":
    sys.exit(main())
