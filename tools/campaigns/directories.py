"""Draw model directories and compare what megalard reads with what transformers reads.

  python -m tools.campaigns.directories --count 500 --seed 0

Each directory is a random small model of one of the supported families: its config.json in one of
the spellings that files have and perhaps with one thing changed, its weights stored in one of the
ways that they are stored in, and one of several tokenizers. Either ids and logits are those of
transformers, or the directory is refused in one sentence. Anything else is printed. It gives status
1, except where transformers itself fails on a directory that megalard reads.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from megalard import cli
from megalard.errors import UserError
from megalard.quiet import quiet_transformers
from tools.campaigns.drawn_config import LENGTH, disturb, draw_family, draw_rope
from tools.campaigns.drawn_files import lay_out_tokenizer, lay_out_weights
from tools.campaigns.drawn_tokenizers import make_stock

# fp32 against float64 through three layers; what is read wrongly is off by 1e-2 or more.
TOLERANCE = 2e-5
TEXTS = (
    "the quick fox",
    "  two  spaces",
    "\n\nlines\n",
    "say </s> and <s> literally",
    "<|im_start|>user\nfox<|im_end|>\n",
    "é and 漢字 123",
)
GOOD = ("equal", "refused by both", "refused by us", "made up by transformers, refused by us")


@dataclass(frozen=True)
class Outcome:
    """What became of one directory.

    Attributes:
        kind: one of ``GOOD``, or ``different``, ``traceback``, or ``read by us alone``.
        detail: how the directory was drawn, and the sentence or the error.
    """

    kind: str
    detail: str


def try_directory(seed: int, stock: Path) -> Outcome:
    """Draw one directory and compare."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        how = _draw(rng, folder, stock)
        if how is None:
            return Outcome("refused by both", f"seed {seed}: transformers cannot make it")
        sizes = _sizes_of(folder)
        is_huge = any(type(size) is int and size > 10**6 for size in sizes)
        expected, made_up = (None, False) if is_huge else _by_transformers(folder)
        try:
            actual = _by_us(folder)
        except UserError as error:
            kind = "refused by us" if expected is not None else "refused by both"
            if made_up:
                kind = "made up by transformers, refused by us"
            return Outcome(kind, f"seed {seed}: {how}: {error}")
        except Exception as error:
            return Outcome("traceback", f"seed {seed}: {how}: {type(error).__name__}: {error}")
    if expected is None or made_up:
        return Outcome("read by us alone", f"seed {seed}: {how}")
    if actual[0] != expected[0]:
        return Outcome("different", f"seed {seed}: {how}: other ids")
    error = float((actual[1] - expected[1]).norm() / expected[1].norm())
    if not error < TOLERANCE:
        return Outcome("different", f"seed {seed}: {how}: logits are off by {error:.2g}")
    return Outcome("equal", f"seed {seed}: {how}")


def _draw(rng: random.Random, folder: Path, stock: Path) -> str | None:
    """Write a directory; return how it was drawn, or None if transformers cannot make the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, config = draw_family(rng)
    rope = draw_rope(rng, family, config)
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, **config), dtype=torch.float32
            )
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.2)
            model.save_pretrained(folder)
    except Exception:
        return None
    tokenizer = lay_out_tokenizer(rng, folder, stock)
    saved = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):
        saved.pop(key, None)
    saved |= rope
    if family == "ministral" and rng.random() < 0.5:
        saved["model_type"] = "mistral"
    change = disturb(rng, saved)
    (folder / "config.json").write_text(json.dumps(saved))
    weights = lay_out_weights(rng, folder)
    kind = rope.get("rope_parameters") or rope.get("rope_scaling") or {"rope_type": "default"}
    name = kind.get("rope_type") or kind.get("type")
    return f"{family}, RoPE {name}, config {change}, weights: {weights}, tokenizer {tokenizer}"


def _sizes_of(folder: Path) -> list:
    """Return the sizes in config.json, for which transformers would take memory unasked."""
    config = json.loads((folder / "config.json").read_text())
    return [value for key, value in config.items() if key != "sliding_window"]


def _ids(vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(min(vocab_size, 250), (1, LENGTH), generator=generator)


def _by_transformers(folder: Path) -> tuple[tuple | None, bool]:
    """Return ids and logits, or None if transformers refuses; and whether it makes weights up."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers(), torch.no_grad():
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float64, output_loading_info=True
            )
            logits = model(_ids(model.config.vocab_size), use_cache=False).logits[0]
            tokenizer = AutoTokenizer.from_pretrained(folder)
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    except Exception:
        return None, False
    made_up = bool(loading["missing_keys"] or loading["mismatched_keys"])
    return (ids, logits), made_up or not bool(logits.isfinite().all())


def _by_us(folder: Path) -> tuple[list, torch.Tensor]:
    """Return ids and logits as the trainer reads them."""
    from megalard.checkpoint.compare import logits_of
    from megalard.checkpoint.open import open_model

    model = open_model(folder)
    ids = model.tokenizer.encode_batch(list(TEXTS))
    logits = logits_of(model, _ids(model.spec.vocab_size)[0], torch.float32)
    return ids, logits.double()


def run(count: int, seed: int, show: bool) -> int:
    """Try directories and print the count of each outcome; return the exit status."""
    outcomes: collections.Counter[str] = collections.Counter()
    bad = []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        stock = Path(name, "tokenizers")
        make_stock(stock)
        for number in range(count):
            outcome = try_directory(seed + number, stock)
            outcomes[outcome.kind] += 1
            if outcome.kind not in GOOD:
                bad.append(outcome)
            if show or outcome.kind not in GOOD:
                print(f"{outcome.kind}: {outcome.detail}", flush=True)
    for kind, number in outcomes.most_common():
        print(f"{number:6d} {kind}")
    return 1 if any(outcome.kind != "read by us alone" for outcome in bad) else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500, help="directories to draw (500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first directory (0)")
    parser.add_argument("--show", action="store_true", help="print every directory")
    options = parser.parse_args(arguments)
    return cli.run(lambda: run(options.count, options.seed, options.show))


if __name__ == "__main__":
    sys.exit(main())
