"""Draw model directories and compare what megalard reads with what transformers reads.

  python -m tools.campaigns.directories --count 500 --seed 0

Each directory is a random small model of one of the supported families. Its config.json has one of
the spellings that are in use, and may have one key changed. Its weights are stored in one of
several ways, and it has one of several tokenizers. Either megalard computes the ids and logits that
transformers computes, or it refuses the directory in one sentence. Anything else is printed. It
gives status 1, except where transformers itself fails on a directory that megalard reads.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megalard.errors import UserError
from megalard.quiet import quiet_transformers
from tools.campaigns.campaign import Campaign
from tools.campaigns.drawn_config import LENGTH, change_config, draw_family, draw_rope
from tools.campaigns.drawn_files import lay_out_tokenizer, lay_out_weights
from tools.campaigns.drawn_tokenizers import make_stock
from tools.campaigns.tally import Outcome

# The rounding of fp32 through three layers. A value that is read wrongly changes logits by 1e-2 or
# more.
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


def try_directory(seed: int, stock: Path) -> Outcome:
    """Draw one directory and compare.

    The kind of the outcome is one of ``GOOD``, or ``different``, ``traceback``, or ``read by us
    alone``.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        description = _draw(rng, folder, stock)
        if description is None:
            return _outcome("refused by both", "transformers cannot make it")
        sizes = _sizes_of(folder)
        is_huge = any(type(size) is int and size > 10**6 for size in sizes)
        expected, made_up = (None, False) if is_huge else _by_transformers(folder)
        try:
            actual = _by_us(folder)
        except UserError as error:
            kind = "refused by us" if expected is not None else "refused by both"
            if made_up:
                kind = "made up by transformers, refused by us"
            return _outcome(kind, description, str(error))
        except Exception as error:
            return _outcome("traceback", description, repr(error))
    if expected is None or made_up:
        return _outcome("read by us alone", description)
    if actual[0] != expected[0]:
        return _outcome("different", description, "other ids")
    error = float((actual[1] - expected[1]).norm() / expected[1].norm())
    if not error < TOLERANCE:
        return _outcome("different", description, f"logits are off by {error:.2g}")
    return _outcome("equal", description)


def _outcome(kind: str, description: str, detail: str = "") -> Outcome:
    # What transformers refuses and we read is no fault, and worth a look.
    is_alone = kind == "read by us alone"
    return Outcome(kind, is_alone or kind in GOOD, description, detail, is_shown=is_alone)


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
    change = change_config(rng, saved)
    (folder / "config.json").write_text(json.dumps(saved))
    weights = lay_out_weights(rng, folder)
    kind = rope.get("rope_parameters") or rope.get("rope_scaling") or {"rope_type": "default"}
    name = kind.get("rope_type") or kind.get("type")
    return f"{family}, RoPE {name}, config {change}, weights: {weights}, tokenizer {tokenizer}"


def _sizes_of(folder: Path) -> list:
    """Return the sizes in config.json that decide how much memory transformers would allocate."""
    config = json.loads((folder / "config.json").read_text())
    return [value for key, value in config.items() if key != "sliding_window"]


def _ids(vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(min(vocab_size, 250), (1, LENGTH), generator=generator)


def _by_transformers(folder: Path) -> tuple[tuple | None, bool]:
    """Return ids and logits, or None if transformers refuses; and whether it invents weights."""
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


def _prepare(folder: Path, options: argparse.Namespace) -> Path:
    torch.set_num_threads(1)
    make_stock(folder)
    return folder


def _outcomes(
    seed: int, stock: Path, scratch: Path, options: argparse.Namespace
) -> Iterator[Outcome]:
    outcome = try_directory(seed, stock)
    yield replace(outcome, is_shown=outcome.is_shown or options.show)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--show", action="store_true", help="print every directory")


CAMPAIGN = Campaign(__doc__, 500, _outcomes, _prepare, add_arguments=_add_arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; return the exit status."""
    return CAMPAIGN.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
