"""Damage sharded checkpoints in ways that their checksums do or do not show."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from megalard.checkpoint.sharded.manifest import MANIFEST, VERSION

WEIGHTS = "weights-00000-000.safetensors"


def digest(body: dict) -> str:
    """Return the checksum of a manifest, as docs/checkpoint_format.md defines it."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def rewrite_manifest(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Change a manifest and give it a checksum that holds."""
    body = json.loads((checkpoint / MANIFEST).read_text())
    del body["checksum"]
    change(body)
    (checkpoint / MANIFEST).write_text(json.dumps({**body, "checksum": digest(body)}))


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


def another_version(checkpoint: Path) -> str:
    """Give the manifest the next version; return what the error must contain."""
    rewrite_manifest(checkpoint, lambda body: body.update(version=VERSION + 1))
    return f"was written in version {VERSION + 1} of the format"


def missing_shard(checkpoint: Path) -> str:
    """Remove a shard; return what the error must contain."""
    (checkpoint / WEIGHTS).unlink()
    return f"{checkpoint} lacks {WEIGHTS}, which its manifest names"


def shard_of_another_step(checkpoint: Path) -> str:
    """Replace a shard by another step's; return what the error must contain."""
    shutil.copy(checkpoint.with_name("step-000007") / WEIGHTS, checkpoint / WEIGHTS)
    return f"{checkpoint / WEIGHTS} "
