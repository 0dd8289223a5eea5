"""Measure models next to each other, on text and on retrieval tasks: tables, one JSON, one PNG.

  megalard evaluate MODEL_DIR RUN/student --text heldout/ --output results/x8
  megalard evaluate RUN/checkpoints/step-000144 --teacher MODEL_DIR --text heldout/ \\
      --lengths 1K 2K 4K --tasks --output results/agreement
  torchrun --nproc-per-node 8 -m megalard evaluate STUDENT --tp 2 --cp 4 --lengths 32K 128K \\
      --output results/retrieval

A MODEL is a Hugging Face directory, a sharded checkpoint, a run's checkpoint or a PEFT adapter (the
last two are merged into the base model they name, or --base, as they are read). All models read the
same tokens:

  with --text      perplexity by length (the same tokens cut into windows of each length), the loss
                   by position in the longest windows and, with --teacher, KL(teacher || model) and
                   the share of tokens with the same most likely token, up to the teacher's window
  with --tasks     retrieval from synthetic text, by length and depth: passkey, multi_key,
                   multi_value, variable_tracking; an answer is correct if greedy decoding would
                   write it exactly

Started with torchrun, each model is split over --tp and --cp ranks, and the remaining ranks (dp)
share the windows and samples; the results do not depend on the layout. One model is in memory at a
time, in addition to the teacher. Most of the time goes into the longest length, and grows with
samples x depths x tasks. docs/evaluation.md says more, also on lm-evaluation-harness and vLLM.
"""

from __future__ import annotations

import argparse
from pathlib import Path

NAME, HELP = "evaluate", "measure models on text and retrieval tasks"
TASKS = ("passkey", "multi_key", "multi_value", "variable_tracking")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    from megalard.commands import tokens

    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="models to compare, in this order")
    add(
        "--output",
        required=True,
        type=Path,
        metavar="NAME",
        help="NAME.json and NAME.png are written; neither may exist",
    )
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="PATH",
        help="text in the forms that training takes (.txt, .jsonl, .parquet and others), "
        "directories of it, or one prepared token directory",
    )
    add(
        "--text-key",
        default="text",
        metavar="KEY",
        help="key of the text in .jsonl files, or its column in tables (default: text)",
    )
    add(
        "--max-tokens",
        type=tokens,
        default=262_144,
        metavar="N",
        help="tokens of the text to read, as 262144 or 256K; at least one window of the longest "
        "length (default: 256K)",
    )
    add(
        "--lengths",
        nargs="+",
        metavar="N",
        help="tokens, as 4096 or 4K (default: from a quarter of the models' smallest window, "
        "doubled up to their largest)",
    )
    add("--teacher", type=Path, metavar="DIR", help="model to compare with; needs --text")
    add(
        "--tasks",
        nargs="*",
        default=list(TASKS),
        metavar="TASK",
        help=f"some of {', '.join(TASKS)}, or nothing for none (default: all)",
    )
    add("--task-lengths", nargs="+", metavar="N", help="lengths of the tasks (default: --lengths)")
    add(
        "--depths",
        nargs="+",
        type=float,
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="D",
        help="places of the statement asked for, 0 (first) to 1 (last) (default: 0 0.25 0.5 "
        "0.75 1)",
    )
    add(
        "--samples",
        type=int,
        default=10,
        metavar="N",
        help="samples for each task, length and depth (default: 10)",
    )
    add(
        "--filler",
        choices=("sentences", "text"),
        default="sentences",
        help="what the statements are hidden in: neutral sentences over and over, or --text "
        "(default: sentences)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="another seed makes other samples (default: 0)",
    )
    add(
        "--bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether documents, windows and tasks begin with the BOS token; auto: as the "
        "tokenizer does (default: auto)",
    )
    add(
        "--eos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether documents end with the EOS token; auto: as the tokenizer does "
        "(default: auto)",
    )
    add("--tokenizer", type=Path, metavar="DIR", help="one for all models (default: their own)")
    add(
        "--base",
        type=Path,
        metavar="DIR",
        help="base model of runs' checkpoints and adapters, if it has moved",
    )
    add("--tp", type=int, default=1, metavar="N", help="tensor-parallel size (default: 1)")
    add("--cp", type=int, default=1, metavar="N", help="context-parallel size (default: 1)")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto takes a GPU if torch sees one (default: auto)",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="dtype of the computation (default: bfloat16 on a GPU, float32 on a CPU)",
    )


def run(options: argparse.Namespace) -> int:
    """Measure and report."""
    from dataclasses import fields

    from megalard.errors import UserError
    from megalard.evaluation.comparison import Request, compare_models
    from megalard.parallel.mesh import build_mesh

    for flag, size in (("--tp", options.tp), ("--cp", options.cp)):
        if size < 1:
            raise UserError(f"{flag} is {size}: give 1 or more")
    request = Request(**{field.name: getattr(options, field.name) for field in fields(Request)})
    compare_models(request, build_mesh(options.device, options.tp, options.cp))
    return 0
