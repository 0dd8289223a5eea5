"""Convert between Hugging Face models and sharded checkpoints, and export what a run trained.

  megalard convert import MODEL_DIR CHECKPOINT        Hugging Face -> sharded
  megalard convert export CHECKPOINT MODEL_DIR        sharded -> Hugging Face
  megalard convert export RUN/checkpoints/step-000144 ADAPTER_DIR --format peft

Start it with torchrun to use several processes. Importing with N processes writes the slices of
tensor-parallel size N. A checkpoint is read at any other size, so one process gives the same
result, more slowly. A process holds one or two tensors at a time, however large the model is. A
source may be a Hugging Face directory, a sharded checkpoint, a run's checkpoint (its LoRA pairs or
weights are merged into the base model it names) or a PEFT adapter. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

NAME, HELP = "convert", "convert between Hugging Face, sharded checkpoints and PEFT adapters"

_EXAMPLES = {
    "import": (
        "write a sharded checkpoint",
        "    megalard convert import /models/llama2-7b /checkpoints/llama2-7b\n"
        "    torchrun --nproc-per-node 4 -m megalard convert import MODEL_DIR CHECKPOINT\n\n"
        "The second writes the slices of tensor-parallel size 4; any size reads either.",
    ),
    "export": (
        "write a Hugging Face directory or a PEFT adapter",
        "    megalard convert export /checkpoints/llama2-7b MODEL_DIR\n"
        "    megalard convert export RUN/checkpoints/step-000144 MODEL_DIR\n"
        "    megalard convert export RUN/checkpoints/step-000144 DIR --format peft\n\n"
        "Under torchrun the processes share the files: choose a --file-size that gives each of\n"
        "them some.",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    directions = parser.add_subparsers(dest="direction", required=True)
    for direction, (text, examples) in _EXAMPLES.items():
        command = directions.add_parser(
            direction,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("source", type=Path, help="model or checkpoint directory to read")
        command.add_argument("target", type=Path, help="directory to write; new or empty")
        command.add_argument(
            "--file-size",
            default="4GiB",
            metavar="SIZE",
            help="a file ends before it would exceed this, such as 500MB (default: 4GiB)",
        )
        command.add_argument(
            "--base",
            type=Path,
            metavar="DIR",
            help="the base model of a run's checkpoint or an adapter, if it has moved",
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="read and check the headers, print what would be written, and stop",
        )
    directions.choices["export"].add_argument(
        "--format",
        choices=("hf", "peft"),
        default="hf",
        help="hf: merged weights; peft: the LoRA pairs alone with the student's "
        "config.json, since an adapter carries no RoPE (default: hf)",
    )
    directions.choices["export"].add_argument(
        "--dtype",
        choices=("source", "float32", "bfloat16", "float16"),
        help="dtype of the merged weights; source keeps that of each tensor (default: "
        "checkpoint.export_dtype of the run whose checkpoint is exported, otherwise source)",
    )
    directions.choices["export"].add_argument(
        "--rounding",
        choices=("nearest", "stochastic"),
        help="how trained weights are rounded to 16 bits; stochastic keeps small changes in the "
        "mean (default: checkpoint.export_rounding of the run, otherwise nearest)",
    )


def run(options: argparse.Namespace) -> int:
    """Convert and report."""
    from megalard.checkpoint import convert
    from megalard.checkpoint.build import check_complete
    from megalard.checkpoint.huggingface import bytes_of_rank
    from megalard.checkpoint.inspection import readable
    from megalard.checkpoint.open import open_model
    from megalard.checkpoint.sharded.save_load import checkpoint_axis
    from megalard.checkpoint.weights import size_of
    from megalard.checkpoint.write_options import WriteOptions
    from megalard.errors import UserError, printable
    from megalard.parallel.agreement import checked_on_all_ranks
    from megalard.parallel.mesh import build_mesh
    from megalard.progress import byte_bar

    mesh = build_mesh("cpu", int(os.environ.get("WORLD_SIZE", "1")))
    is_import = options.direction == "import"
    is_adapter = not is_import and options.format == "peft"
    with checked_on_all_ranks(mesh.world):
        file_bytes = convert.parse_size(options.file_size)
        model = open_model(options.source, options.base)
        convert.check_target(options.target)
        check_complete(model.weights, model.spec)
        weights = model.trained if is_adapter and model.trained else model.weights
        if is_import:
            convert.weight_slices(weights, model.spec, mesh.tp)
        if is_adapter:
            convert.check_adapter(model)
            if options.dtype is not None or options.rounding is not None:
                raise UserError(
                    "--dtype and --rounding are for merged weights: leave them out with --format "
                    "peft"
                )
        elif not is_import:
            rounding = convert.export_rounding(model, options.dtype, options.rounding)
            weights = convert.weights_to_export(model, rounding)
    total = size_of(weights)
    summary = (
        f"{len(weights.names())} tensors, {readable(total)}, of {options.source} ({model.kind})"
    )
    if options.dry_run:
        if mesh.is_rank_0:
            print(printable(f"would write {summary} to {options.target}; nothing was written"))
        return 0
    start = time.perf_counter()
    title, share = f"{options.direction} {options.source.name}", total // mesh.world.size
    if not is_import and not is_adapter:
        share = bytes_of_rank(weights, file_bytes, mesh.world)
    if mesh.world.size > 1:
        title += f", one of {mesh.world.size} parts"
    with byte_bar(title, share, mesh.world) as advance:
        write = WriteOptions(file_bytes=file_bytes, progress=advance)
        if is_import:
            axis = checkpoint_axis(mesh)
            convert.import_model(model, options.target, mesh, axis, write)
        elif is_adapter:
            with checked_on_all_ranks(mesh.world):
                if mesh.is_rank_0:
                    convert.export_adapter(model, options.target, write)
        else:
            convert.export_model(model, options.target, mesh.world, write, rounding)
    if mesh.is_rank_0:
        seconds = time.perf_counter() - start
        print(printable(f"{options.target}: {summary}, in {seconds:.1f} s"))
    return 0
