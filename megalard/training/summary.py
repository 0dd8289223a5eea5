"""What a run writes at its end: summary.json, the report, and a picture for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from megalard.checkpoint.sharded.manifest import written_by
from megalard.files.writing import replace_text
from megalard.model.rope import RopeTable, rope_table
from megalard.parallel.mesh import Mesh
from megalard.report.collect import SUMMARY, collect
from megalard.report.figures import heat_map
from megalard.report.page import write_report
from megalard.reporter import Reporter
from megalard.training.board import Board
from megalard.training.plan import Plan


def write_summary(directory: Path, plan: Plan, mesh: Mesh, facts: dict) -> None:
    """Write what the other files of a run do not say: where it ended, its ranks and its RoPE.

    Args:
        facts: where the run ended.

    Raises:
        OSError: the file cannot be written.
    """
    is_gpu = mesh.device.type == "cuda"
    teacher, student = (rope_table(spec) for spec in (plan.teacher.spec, plan.student))
    summary = {
        **facts,
        **written_by(mesh),
        "device": torch.cuda.get_device_name(mesh.device) if is_gpu else mesh.device.type,
        "rope": {
            "type": plan.student.rope["rope_type"],
            "native_window": plan.native_window,
            "window": plan.student.max_positions,
            "teacher": _frequencies(teacher),
            "student": _frequencies(student),
        },
    }
    replace_text(directory / SUMMARY, json.dumps(summary, indent=2) + "\n")


def report_run(directory: Path, board: Board | None, step: int, reporter: Reporter) -> None:
    """Write ``report.html``, and give TensorBoard the losses by layer.

    The run has its results already, so that an error is only warned about.
    """
    try:
        picture = heat_map(collect(directory).layer_losses(), "png")
        if board is not None and picture is not None:
            board.add_image("loss by layer", picture, step)
        reporter.line(f"report: {write_report(directory)}")
    except Exception as error:
        reporter.warning(
            f"the report was not written ({type(error).__name__}: {error}); megalard report "
            f"{directory} writes it again"
        )


def _frequencies(table: RopeTable) -> Sequence[float]:
    """Return the inverse frequencies of the longest documents."""
    return (table.inv_freq if table.long_inv_freq is None else table.long_inv_freq).tolist()
