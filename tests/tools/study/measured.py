"""Results of runs that nobody ran."""

from __future__ import annotations

from tools.study.lengths import SHORT_LENGTHS, STUDENT_WINDOW

PYTHON_OFFSET = 1.0
"""How much higher every loss is in the domain python than in the others."""


def measured(loss: float, accuracy: float = 0.5) -> dict:
    """Return what was measured of a model whose loss is ``loss`` out of the training domain."""

    def one(domain: str) -> dict:
        shift = PYTHON_OFFSET if domain == "python" else 0.0
        return {"loss": loss + shift, "accuracy": accuracy, "kl": 0.1, "agreement": 0.9}

    def text(domain: str) -> dict:
        lengths = {str(n): one(domain) for n in (*SHORT_LENGTHS, STUDENT_WINDOW)}
        return lengths | {"by_position": [one(domain)] * 11}

    by_depth = {"0.0": 1.0, "1.0": 0.5}
    tasks = {
        "passkey": {
            "512": {"exact": 1.0, "by_depth": by_depth},
            "1024": {"exact": 0.5, "by_depth": by_depth},
            "4096": {"exact": 0.25, "by_depth": by_depth},
        }
    }
    return {"domains": {name: text(name) for name in ("python", "prose", "c")}, "tasks": tasks}


def final(method: str, seed: int, losses: list[float], rope: str = "linear") -> dict:
    """Return a final run, with a curve of losses at 1000, 10000, ... tokens."""
    curve = [
        {"tokens": 1000 * 10**i, "domains": measured(loss)["domains"]}
        for i, loss in enumerate(losses)
    ]
    run = {"kind": "final", "method": method, "rope": rope, "rate": 0.1, "seed": seed}
    return run | {"compared": measured(losses[-1], 0.4), "curve": curve}


def baselines(teacher: float = 2.0, scaled: float = 4.0) -> list[dict]:
    """Return the runs of the teacher and of the scaled student."""
    return [
        {
            "kind": "baseline",
            "method": name,
            "rope": "linear",
            "compared": measured(loss),
            "curve": [{"tokens": 0, "domains": measured(loss)["domains"]}],
        }
        for name, loss in (("teacher", teacher), ("scaled", scaled))
    ]
