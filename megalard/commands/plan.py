"""Estimate a run before it is paid for: memory by kind, layouts that fit, time, and what to change.

  megalard plan --model MODEL --config FILE --gpus '8 x H100 80GB' [--section.key value ...]

MODEL is a model directory, or a config.json alone; without it, model.teacher is read. No weights,
no text and no GPU are needed, and nothing is downloaded. --gpus names the GPUs of one node.
The plan tries all values of parallel.tp and parallel.cp that the GPUs allow, and takes everything
else from the configuration. The exit status is 0 if a layout fits, and 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from megalard.config.file import load_config
from megalard.errors import UserError

NAME, HELP = "plan", "estimate memory and time of a run on given GPUs, from config.json alone"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a Hugging Face model directory or its config.json (default: model.teacher)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with the sections below, or the name of a recipe",
    )
    parser.add_argument(
        "--gpus",
        required=True,
        metavar="TEXT",
        help="number and type of the GPUs of one node, such as '8 x H100 80GB'",
    )
    parser.add_argument(
        "--nodes", type=_count, default=1, metavar="N", help="number of nodes (default: 1)"
    )
    parser.add_argument(
        "--gpu-memory",
        type=_positive,
        metavar="GIB",
        help="memory of a GPU in GiB, for a GPU that is not in the table or has another size",
    )
    parser.add_argument(
        "--gpu-tflops",
        type=_positive,
        metavar="N",
        help="dense bf16 TFLOP/s of the data sheet, for a GPU that is not in the table",
    )
    parser.add_argument(
        "--network",
        type=_positive,
        default=50.0,
        metavar="GB/S",
        help="GB/s that one GPU sends to other nodes (default: 50, a 400 Gb/s card per GPU)",
    )
    parser.add_argument(
        "--host-memory",
        type=_positive,
        metavar="GIB",
        help="host memory of a node in GiB, which limits parallel.offload and "
        "parallel.offload_optimizer (not limited when not given)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the plan of a run; return 1 if no layout fits."""
    from megalard.estimate.gpus import GIB, Machines, parse_gpus
    from megalard.estimate.report import plan_json, plan_lines
    from megalard.training.planned import check_of, plan_run, read_shape

    count, gpu = parse_gpus(options.gpus, options.gpu_memory, options.gpu_tflops)
    host_memory = None if options.host_memory is None else options.host_memory * GIB
    machines = Machines(gpu, count, options.nodes, options.network * 1e9, host_memory)
    config = load_config(options.config, options.rest, has_files=False)
    if options.model is None and not config.model.teacher:
        raise UserError("there is no model: give --model MODEL, a directory or its config.json")
    spec = read_shape(Path(options.model or config.model.teacher))
    result = plan_run(config, spec, machines, check_of(config, spec))
    if options.json:
        print(json.dumps(plan_json(result), indent=2))
    else:
        for line in plan_lines(result):
            print(line)
    return 0 if result.fitting else 1


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not a number of nodes: give 1 or more")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
