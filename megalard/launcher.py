"""torchrun as launch/train.sh uses it: ``python -m megalard.launcher TORCHRUN_OPTIONS``.

It is torchrun with four differences. On one node nothing listens on the network: the processes find
each other through files in a private directory. The ranks end when the launcher ends, and the
launcher when its own parent ends. Ranks that bad input ended are not started again, however many
restarts are allowed. The sentence that explains a failure is printed once and last, in place of
torchrun's report.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from megalard.error_file import PRINTS_REASONS, failure_of
from megalard.parents import end_with_parent

VERBOSE = "--verbose"


class _Agent(LocalElasticAgent):
    """torchrun's agent, which does not start ranks again that a user's error ended."""

    def _monitor_workers(self, worker_group):
        result = super()._monitor_workers(worker_group)
        if any(failure_of(failure.error_file).is_bad_input for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with these options; return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_verbose = VERBOSE in words[:1]
    options = torchrun.parse_args(words[1:] if is_verbose else words)
    end_with_parent()
    if not is_verbose:
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    api.LocalElasticAgent = _Agent  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="megalard-launch-") as folder:
        if not options.log_dir:
            options.log_dir = folder
            Path(folder, PRINTS_REASONS).touch()
        if options.nnodes in ("1", "1:1"):
            options.rdzv_backend, options.rdzv_conf = "c10d", "store_type=file"
            options.rdzv_endpoint = str(Path(folder, "rendezvous"))
            options.rdzv_id = uuid.uuid4().hex
        try:
            torchrun.run(options)
        except ChildFailedError as error:
            if is_verbose:
                print(error, file=sys.stderr)
            return _report(error.failures)
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def _report(failures: dict[int, ProcessFailure]) -> int:
    """Print what ended the ranks of this node; return the exit status."""
    in_time = sorted(failures.items(), key=lambda item: item[1].timestamp)
    reasons = [failure_of(failure.error_file).sentence for _, failure in in_time]
    rank, first = in_time[0]
    sentence = next(filter(None, reasons), "")
    if not sentence:
        how = (
            f"was ended by {first.signal_name()}"
            if first.exitcode < 0
            else f"ended with status {first.exitcode}"
        )
        sentence = f"rank {rank} (process {first.pid}) {how}; its own messages are above"
    print(f"megalard: error: {sentence}", file=sys.stderr, flush=True)
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


if __name__ == "__main__":
    sys.exit(main())
