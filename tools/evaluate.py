"""Measures models side by side, on text and on retrieval tasks: tables, one JSON, one PNG.

    python tools/evaluate.py MODEL_DIR RUN/student --text heldout/ --output results/x8
    python tools/evaluate.py RUN/checkpoints/step-000144 --teacher MODEL_DIR --text heldout/ \\
        --lengths 1K 2K 4K --tasks --output results/agreement
    torchrun --nproc-per-node 8 tools/evaluate.py STUDENT --tp 2 --cp 4 --lengths 32K 128K \\
        --output results/retrieval

A MODEL is a Hugging Face directory, a sharded checkpoint, a run's checkpoint or a PEFT adapter
(the last two are merged into the base model they name, or --base, as they are read). All models
get the same tokens:

  with --text      perplexity by length (the same tokens cut into windows of each length), the loss
                   by position in the longest windows and, with --teacher, KL(teacher || model) and
                   the share of tokens that both put first, at lengths up to the teacher's window
  with --tasks     retrieval from synthetic text, by length and depth: passkey, multi_key,
                   multi_value, variable_tracking; an answer is right if greedy decoding would
                   write it exactly

Started with torchrun, each model is split over --tp and --cp ranks, and the ranks that remain
(dp) share the windows and samples; the figures do not depend on it. One model is in memory at a
time, beside the teacher. The time goes with samples x depths x tasks, mostly at the longest length.
docs/evaluation.md says more, also on lm-evaluation-harness and vLLM.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

TASKS = ("passkey", "multi_key", "multi_value", "variable_tracking")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        help=".txt, .md, .py and .jsonl files, folders of them, or one prepared token store",
    )
    add("--text-key", default="text", metavar="KEY", help="key of the text in .jsonl (text)")
    add(
        "--max-tokens",
        type=int,
        default=262_144,
        metavar="N",
        help="tokens of the text to read; at least one window of the longest length (262144)",
    )
    add(
        "--lengths",
        nargs="+",
        metavar="N",
        help="tokens, as 4096 or 4K (default: a quarter of the models' smallest window, doubled up "
        "to their largest)",
    )
    add("--teacher", type=Path, metavar="DIR", help="model to compare with; needs --text")
    add(
        "--tasks",
        nargs="*",
        default=list(TASKS),
        metavar="TASK",
        help=f"some of {', '.join(TASKS)}, or nothing for none (default: all)",
    )
    add("--task-lengths", nargs="+", metavar="N", help="lengths of the tasks, if not --lengths")
    add(
        "--depths",
        nargs="+",
        type=float,
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="D",
        help="where the statement asked for stands, 0 (first) to 1 (last) (0 0.25 0.5 0.75 1)",
    )
    add("--samples", type=int, default=10, metavar="N", help="of each task, length and depth (10)")
    add(
        "--filler",
        choices=("sentences", "text"),
        default="sentences",
        help="what the statements are hidden in: neutral sentences over and over, or --text",
    )
    add("--seed", type=int, default=0, metavar="N", help="another seed makes other samples (0)")
    add("--bos", action="store_true", help="begin tasks with the bos_token_id of config.json")
    add("--tokenizer", type=Path, metavar="DIR", help="for all models (default: the models' own)")
    add(
        "--base",
        type=Path,
        metavar="DIR",
        help="base model of runs' checkpoints and adapters, if it has moved",
    )
    add("--tp", type=int, default=1, metavar="N", help="tensor-parallel size (1)")
    add("--cp", type=int, default=1, metavar="N", help="context-parallel size (1)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="to compute in (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> None:
    # Imported late: --help should not wait for torch and transformers.
    from megalard.evaluation.command import compare
    from megalard.parallel.mesh import build_mesh

    compare(options, build_mesh(options.device, options.tp, options.cp))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    from megalard.errors import UserError

    first = os.environ.get("RANK", "0") == "0"
    try:
        evaluate(options)
    except UserError as error:
        if first:
            print(f"megalard: error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(
            f"megalard: error: the GPU's memory is too small ({str(error).splitlines()[0]}): "
            "use more ranks with --tp or --cp, or shorter --lengths",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        if first:
            print("megalard: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
