"""Values for TensorBoard, written at once and in this thread, so that errors reach the caller."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Board:
    """A file of events in a directory that TensorBoard shows.

    ``torch.utils.tensorboard`` writes in a thread of its own, which prints a traceback when the
    disk is full.

    Args:
        folder: the directory, which is made.
        first_step: events of earlier files from this step on are no longer shown.

    Raises:
        OSError: the file cannot be written; ``add`` raises it too.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write the scalars of a step."""
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=Summary(value=scalars))

    def add_image(self, tag: str, png: bytes, step: int) -> None:
        """Write a picture, which a PNG file holds."""
        width, height = struct.unpack(">II", png[16:24])  # of the header chunk
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **content) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
