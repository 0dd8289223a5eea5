"""Try generated configuration files and overrides: each is read, or refused in one sentence.

  python -m tools.campaigns.settings --count 15000 --seed 0

The campaign trains nothing. It prints each traceback, error of several lines and answer that takes
more than a second, and then exits with status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalard.config.file import load_config, recorded_config
from megalard.config.schema import Config, to_dict
from megalard.errors import UserError
from tools.campaigns.campaign import Campaign
from tools.campaigns.drawn_settings import draw_tree, write_yaml
from tools.campaigns.tally import Outcome

SLOWEST_S = 1.0

_VALUES = (
    "",
    "null",
    "~",
    "true",
    "yes",
    "no",
    "0",
    "1",
    "-1",
    "3",
    "8",
    "2.5",
    "1e-5",
    "2e-5",
    ".inf",
    "-.inf",
    ".nan",
    "1e300",
    "1e400",
    "18446744073709551616",
    "9" * 400,
    "9" * 5000,
    "0x" + "f" * 5000,
    "1_000",
    "0o17",
    "1:30",
    "2020-13-45",
    "2020-01-01",
    "!!int x",
    "!!bool x",
    "!!float ''",
    "!!timestamp x",
    "!!binary x",
    "!!set [a]",
    "!!python/object/apply:os.system [id]",
    "[a, b]",
    "[1, 2",
    "[" * 2000,
    "{" * 2000,
    "{a: 1}",
    "{a: {b: {c: 1}}}",
    "'",
    '"',
    "\t",
    "a\nb",
    "- a\n- b",
    "&a [*a]",
    "*a",
    "<<: *a",
    "%YAML",
    "---",
    "...",
    "\x00",
    "\x1b[31m",
    "\ud800",
    '"\\U00110000"',
    "é",
    "漢字",
    "/tmp",
    "~",
    "a" * 300,
    "a/" * 3000,
    "lora",
    "all",
    "linear",
    "yarn",
    "cpu",
    "cuda",
    "float32",
    "q",
    "[q, k, v]",
    "[q, q]",
    "[]",
    "[[]]",
    "[null]",
    "[1.5]",
    "{q: 1, k: 0}",
    "{rank: 4}",
    "{rank: 4, alpha: x}",
    "{rank: {}}",
)
_LINES = (
    "{key}: {value}",
    "{section}:\n  {name}: {value}",
    "{section}: {value}",
    "{section}:\n\t{name}: {value}",
    "{section}: {{{name}: {value}}}",
    "{section}: &a\n  {name}: {value}\nstreams: *a",
    "- {value}",
    "{section}:\n  {name}: {value}\n{section}:\n  {name}: {value}",
    "? {value}\n: {value}",
    "streams:\n  {value}:\n    objective: {{language_modelling: 1}}",
    "stages:\n  a:\n    {section}: {{{name}: {value}}}",
    "streams:\n  s: {{{section}: {{{name}: {value}}}}}",
    "{name}{value}",
    "{value}",
)


# These settings make a configuration complete, so that only the drawn settings decide the outcome.
_COMPLETE = (
    "--model.teacher=teacher",
    "--rope.factor=4",
    "--run.output=run",
    "--trainable.lora.rank=4",
    "--data.paths=text.txt",
    "--data.context_length=32",
    "--optimizer.learning_rate=1e-3",
    "--optimizer.steps=4",
)


def keys_of(cls: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of all settings."""
    keys = []
    for field in dataclasses.fields(cls):
        kind = field.default_factory
        if dataclasses.is_dataclass(kind):
            keys += keys_of(kind, f"{prefix}{field.name}.")
        else:
            keys.append(prefix + field.name)
    return keys


def draw(rng: random.Random, folder: Path) -> tuple[str | None, list[str]]:
    """Return a configuration file, or None, and overrides."""
    if rng.random() < 0.4:
        return _draw_whole(rng, folder)
    keys = [*keys_of(Config), "optimizer.lr", "no.such.key", "streams.s.data.packing", "stages.a.x"]
    path = None
    if rng.random() < 0.5:
        lines = []
        for _ in range(rng.randint(1, 4)):
            section, _, name = rng.choice(keys).partition(".")
            value = rng.choice(_VALUES)
            template = rng.choice(_LINES)
            lines.append(template.format(key=section, section=section, name=name, value=value))
        content = rng.choice(["\n", "\n\n", "\r\n"]).join(lines).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            content = bytes(byte ^ (1 << rng.randrange(8)) for byte in content[:2000])
        path = str(folder / "config.yaml")
        Path(path).write_bytes(content)
    complete = rng.random() < 0.5
    overrides = list(_COMPLETE) if complete else []
    for _ in range(rng.randint(0, 2 if complete else 5)):
        key, value = rng.choice(keys), rng.choice(_VALUES)
        word = rng.choice([f"--{key}={value}", f"--{key}", value, f"--{key}.{key}={value}"])
        overrides += [word] if "=" in word else [word, value]
    return path, overrides


def _draw_whole(rng: random.Random, folder: Path) -> tuple[str, list[str]]:
    path = folder / "config.yaml"
    text = write_yaml(rng, draw_tree(rng))
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return str(path), [*_COMPLETE] if rng.random() < 0.8 else []


def _outcomes(
    seed: int, material: None, scratch: Path, options: argparse.Namespace
) -> Iterator[Outcome]:
    path, overrides = draw(random.Random(seed), scratch)
    start = time.process_time()
    try:
        config = load_config(path, overrides)
        kind, detail = "read", ""
        # A run resumes with what it recorded.
        if recorded_config(json.loads(json.dumps(to_dict(config)))) != config:
            kind = "recorded differently"
    except UserError as error:
        kind, detail = "refused", str(error)
    except Exception as error:
        kind, detail = "traceback", f"{type(error).__name__}: {error}"[:300]
    if kind == "refused" and ("\n" in detail or len(detail) > 2000):
        kind = "sentence of several lines"
    if time.process_time() - start > SLOWEST_S:
        kind = "slow"
    case = f"{overrides!r}"[:300] if path is None else f"{Path(path).read_bytes()!r}"[:600]
    yield Outcome(kind, kind in ("read", "refused"), case, detail)


CAMPAIGN = Campaign(__doc__, 15_000, _outcomes)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; return the exit status."""
    return CAMPAIGN.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
