"""Compare ways of rounding a trained model to bf16: nearest, stochastic, and with error feedback.

    python -m tools.bench.export_rounding RUN/checkpoints/step-000006 --text heldout.jsonl

The trained weights of a run's checkpoint are merged in fp32 and rounded to bf16. Each model is then
computed in fp32 on the text. Printed are, against the fp32 model,

- lost: the share of the changed weights that are equal to the base model's again,
- error: the norm of the rounding errors, relative to the norm of the changes,
- KL: the mean of KL(fp32 || rounded) over the tokens, in nats,
- loss: the cross-entropy of the rounded model minus that of the fp32 model, in nats,
- kept: the share of what training changed in the loss that the rounded model still has.

Stochastic rounding goes up or down with probabilities in proportion to the distances, so that its
mean is the exact value; the range over the seeds is printed. Error feedback adds the error of a
weight to the next weight of the same row before that one is rounded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from megalard import cli
from megalard.checkpoint.compare import logits_of, read_tokens
from megalard.checkpoint.open import StoredModel, open_model
from megalard.checkpoint.rounding import RoundingLoss, rounded
from megalard.checkpoint.weights import ConvertedWeights, MergedWeights, Weights, trained_parts
from megalard.errors import UserError
from megalard.model.parameter_slice import ParameterSlice

_DTYPE = torch.bfloat16
Rounding = Callable[[torch.Tensor, str], torch.Tensor]


def nearest(exact: torch.Tensor, name: str) -> torch.Tensor:
    """Round to the nearest value of bf16, ties to even."""
    return rounded(exact, _DTYPE, name)


def stochastic(exact: torch.Tensor, name: str, seed: int) -> torch.Tensor:
    """Round up or down at random. An export has seed 0."""
    return rounded(exact, _DTYPE, f"{name}{seed or ''}", 0, stochastic=True)


def with_feedback(exact: torch.Tensor, name: str) -> torch.Tensor:
    """Round each row from left to right; the error of a weight is added to the next one."""
    rows = exact.reshape(-1, exact.shape[-1])
    result = torch.empty_like(rows, dtype=_DTYPE)
    error = torch.zeros(len(rows))
    for column in range(rows.shape[1]):
        wanted = rows[:, column] + error
        result[:, column] = wanted.to(_DTYPE)
        error = wanted - result[:, column].float()
    return result.view(exact.shape)


class _Replaced:
    """A model of which some tensors are replaced."""

    def __init__(self, weights: Weights, tensors: dict[str, torch.Tensor]):
        self._weights, self._tensors, self.directory = weights, tensors, weights.directory
        self.names, self.shape, self.files = weights.names, weights.shape, weights.files

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._tensors else self._weights.dtype(name)

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        if name not in self._tensors:
            return self._weights.read(name, held)
        tensor = self._tensors[name].float()
        return tensor if held is None else held.cut(tensor)


@dataclass(frozen=True)
class _Result:
    lost: float
    error: float
    kl: float
    loss: float


class _Comparison:
    """The fp32 model of a checkpoint, to which rounded ones are compared."""

    def __init__(self, model: StoredModel, text: Path, count: int):
        assert model.trained is not None and model.base is not None
        self.model, self.base = model, model.base.weights
        assert isinstance(model.weights, MergedWeights)
        self.exact = ConvertedWeights(model.weights.rounded_to(torch.float32), torch.float32)
        trained = model.trained.names()
        self.names = [name for name in self.exact.names() if trained_parts(name, trained)]
        self.tokens = read_tokens([model], text, count)
        logits = self._logits({})
        self._log_p, self._loss = logits.log_softmax(-1), self._loss_of(logits)
        untrained = {name: self.base.read(name) for name in self.names}
        self.gain = self._loss_of(self._logits(untrained)) - self._loss

    def _logits(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        model = replace(self.model, weights=_Replaced(self.exact, tensors))
        return logits_of(model, self.tokens, torch.float32).double()

    def _loss_of(self, logits: torch.Tensor) -> float:
        return float(F.cross_entropy(logits[:-1], self.tokens[1:]))

    def measure(self, rounding: Rounding) -> _Result:
        """Round the trained tensors and compare."""
        tensors, counted = {}, RoundingLoss()
        squares = [0.0, 0.0]
        for name in self.names:
            before, exact = self.base.read(name).float(), self.exact.read(name)
            tensors[name] = rounding(exact, name)
            counted.add(before, exact, tensors[name])
            squares[0] += float((tensors[name].double() - exact).square().sum())
            squares[1] += float((exact.double() - before).square().sum())
        logits = self._logits(tensors)
        kl = (self._log_p.exp() * (self._log_p - logits.log_softmax(-1))).sum(-1).mean()
        error = (squares[0] / squares[1]) ** 0.5
        return _Result(counted.share, error, float(kl), self._loss_of(logits) - self._loss)


def compare(checkpoint: Path, text: Path, tokens: int, seeds: int) -> None:
    """Print the table of one checkpoint."""
    model = open_model(checkpoint)
    if model.kind != "training":
        raise UserError(f"{checkpoint} is not a checkpoint of a run: give one")
    comparison = _Comparison(model, text, tokens)
    print(
        f"{checkpoint}: {len(comparison.names)} trained tensors, {len(comparison.tokens)} tokens; "
        f"training lowered the loss by {comparison.gain:.4f}"
    )
    print(f"{'rounding':22}{'lost':>8}{'error':>9}{'KL':>12}{'loss':>12}{'kept':>9}")
    _print("nearest", [comparison.measure(nearest)], comparison.gain)
    _print("error feedback", [comparison.measure(with_feedback)], comparison.gain)
    results = [comparison.measure(partial(stochastic, seed=seed)) for seed in range(seeds)]
    _print(f"stochastic, {seeds} seeds", results, comparison.gain)


def _print(name: str, results: list[_Result], gain: float) -> None:
    ends = sorted(results, key=lambda result: result.kl)
    for result in dict.fromkeys((ends[0], ends[-1])):
        kept = 1 - result.loss / gain
        print(
            f"{name:22}{result.lost:8.1%}{result.error:9.3f}{result.kl:12.2e}{result.loss:12.2e}"
            f"{kept:9.1%}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="+", help="a checkpoint of a run")
    parser.add_argument("--text", type=Path, required=True, help="text that was not trained on")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the text (1024)")
    parser.add_argument("--seeds", type=int, default=4, help="seeds of stochastic rounding (4)")
    options = parser.parse_args(arguments)

    def run() -> None:
        for checkpoint in options.checkpoint:
            compare(checkpoint, options.text, options.tokens, options.seeds)

    return cli.run(run)


if __name__ == "__main__":
    sys.exit(main())
