"""The file of results of a study, and the learning rates that it chooses."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megalard.errors import UserError
from tools.study.methods import METHODS

RESULTS = "results.jsonl"
# The names of two numbers in files of earlier versions.
_OLD_NAMES = {"tokens_a_step": "tokens_per_step", "seconds_a_step": "seconds_per_step"}


def read_results(folder: Path) -> list[dict]:
    """Return the results of all runs of a study, in the order in which they ended."""
    path = folder / RESULTS
    if not path.exists():
        return []
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [{_OLD_NAMES.get(key, key): value for key, value in line.items()} for line in lines]


def best_rate(results: list[dict], method: str, rope: str) -> float:
    """Return the learning rate with the lowest validation loss.

    A RoPE that was not searched takes the rate of one that was.

    Raises:
        UserError: no rate of the method was tried.
    """
    tried = [r for r in results if (r["kind"], r["method"]) == ("search", method)]
    tried = [result for result in tried if result["rope"] == rope] or tried
    if not tried:
        raise UserError(
            f"no learning rate of {method} was tried: run the command search with it first"
        )
    return min(tried, key=validation_loss)["rate"]


def validation_loss(result: dict) -> float:
    """Return the mean loss over all lengths; infinity for a run that diverged."""
    losses = [m["loss"] for by_length in result["validation"].values() for m in by_length.values()]
    mean = sum(losses) / len(losses)
    return math.inf if math.isnan(mean) else mean


def reported(results: list[dict]) -> list[dict]:
    """Return the results that a report is about.

    Of the final runs these are the runs at each method's best rate, and of the timed runs the runs
    of the present methods. Runs of earlier searches and recipes stay in the file.
    """

    def is_reported(result: dict) -> bool:
        if result["kind"] == "final":
            method, rope = result["method"], result["rope"]
            return method in METHODS and result["rate"] == best_rate(results, method, rope)
        return result["kind"] != "timing" or result["method"] in METHODS

    return [result for result in results if is_reported(result)]
