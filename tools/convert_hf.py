"""Converts between Hugging Face models and sharded checkpoints, and exports what a run trained.

    python tools/convert_hf.py import MODEL_DIR CHECKPOINT        Hugging Face -> sharded
    python tools/convert_hf.py export CHECKPOINT MODEL_DIR        sharded -> Hugging Face
    python tools/convert_hf.py export RUN/checkpoints/step-000144 ADAPTER_DIR --format peft

Start it with torchrun to use several processes; importing with N processes writes the slices of
tensor parallel size N. A checkpoint is read at any other size, so one process is as good, if
slower. A process holds a tensor or two at a time, whatever the model's size. Any source may be a
Hugging Face directory, a sharded checkpoint, a run's checkpoint (its LoRA pairs or weights are
merged into the base model it names) or a PEFT adapter. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text, more in (
        (
            "import",
            "write a sharded checkpoint",
            "    python tools/convert_hf.py import /models/llama2-7b /checkpoints/llama2-7b\n"
            "    torchrun --nproc-per-node 4 tools/convert_hf.py import MODEL_DIR CHECKPOINT\n\n"
            "The second writes the slices of tensor parallel size 4; any size reads either.",
        ),
        (
            "export",
            "write a Hugging Face directory or a PEFT adapter",
            "    python tools/convert_hf.py export /checkpoints/llama2-7b MODEL_DIR\n"
            "    python tools/convert_hf.py export RUN/checkpoints/step-000144 MODEL_DIR\n"
            "    python tools/convert_hf.py export RUN/checkpoints/step-000144 DIR "
            "--format peft\n\n"
            "Under torchrun the processes share the files: choose a --file-size that gives each "
            "some.",
        ),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\n{more}",
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
            help="read the headers, check that all fits, say what would be written, and stop",
        )
    commands.choices["export"].add_argument(
        "--format",
        choices=("hf", "peft"),
        default="hf",
        help="hf: merged weights (default); peft: the LoRA pairs alone, with the student's "
        "config.json beside them, since an adapter carries no RoPE",
    )
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> None:
    # Imported late: --help should not wait for torch and transformers.
    from megalard.checkpoint import convert as work
    from megalard.checkpoint.huggingface_writer import bytes_of_rank
    from megalard.checkpoint.inspect import readable
    from megalard.checkpoint.open import open_model
    from megalard.checkpoint.sharded.save_load import checkpoint_axis
    from megalard.parallel.agreement import checked_on_all_ranks
    from megalard.parallel.mesh import build_mesh
    from megalard.progress import progress_bar

    mesh = build_mesh("cpu", int(os.environ.get("WORLD_SIZE", "1")))
    with checked_on_all_ranks(mesh.world):
        file_bytes = work.parse_size(options.file_size)
        model = open_model(options.source, options.base)
        work.check_target(options.target)
        work.check_complete(model.weights, model.spec)
        adapter = options.command == "export" and options.format == "peft"
        weights = model.trained if adapter and model.trained else model.weights
        if options.command == "import":
            work.weight_layouts(weights, model.spec, mesh.tp)
        if adapter:
            work.check_adapter(model)
    first = mesh.world.rank == 0
    total = work.size_of(weights)
    what = f"{len(weights.names())} tensors, {readable(total)}, of {options.source} ({model.kind})"
    if options.dry_run:
        if first:
            print(f"would write {what} to {options.target}; nothing was written")
        return
    began = time.perf_counter()
    title, part = f"{options.command} {options.source.name}", total // mesh.world.size
    if options.command == "export" and not adapter:
        part = bytes_of_rank(weights, file_bytes, mesh.world)
    if mesh.world.size > 1:
        title += f", one of {mesh.world.size} parts"
    with progress_bar(title, part, mesh.world) as advance:
        if options.command == "import":
            axis = checkpoint_axis(mesh)
            work.import_model(model, options.target, mesh, axis, file_bytes, advance)
        elif adapter:
            with checked_on_all_ranks(mesh.world):
                if first:
                    work.export_adapter(model, options.target, advance)
        else:
            work.export_model(model, options.target, mesh.world, file_bytes, advance)
    if first:
        print(f"{options.target}: {what}, in {time.perf_counter() - began:.1f} s")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from megalard.errors import UserError

    try:
        convert(options)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"megalard: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("megalard: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        if "torch" in sys.modules:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
