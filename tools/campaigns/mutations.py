"""Change files as damage, other programs and attackers change them."""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    3,
    2.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    10**30,
    "",
    "x",
    "64",
    "a\nb: c\x1b[31m",
    "\ud800",
    "/etc/passwd",
    "../../x",
    "x" * 10_000,
    [],
    [0],
    [-1, 2],
    [0, 10**30],
    [[]],
    ["a", "b"],
    {},
    {"a": 1},
    {"rope_theta": None},
    "HUGE",
    "DEEP",
    "DEEPER",
)
# A number of 400 digits, and two depths: within and beyond what Python's parser takes.
_WRITTEN = {
    "HUGE": "9" * 400,
    "DEEPER": "[" * 200_000 + "]" * 200_000,
    "DEEP": "[" * 300 + "]" * 300,
}


def change_json(rng: random.Random, path: Path) -> str:
    """Change one place of a JSON file; return a description."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return change_bytes(rng, path)
    content, change = changed(rng, content)
    path.write_text(to_text(content))
    return change


def to_text(content: Any) -> str:
    """Return content as JSON text, with marks replaced by JSON that Python would not write."""
    text = json.dumps(content)
    for mark, written in _WRITTEN.items():
        text = text.replace(f'"{mark}"', written)
    return text


def changed(rng: random.Random, content: Any) -> tuple[Any, str]:
    """Return JSON content with one place changed, and a description of the change."""
    choice = rng.random()
    if choice < 0.05:
        return rng.choice(_VALUES), "another value as a whole"
    places = list(_places(content))
    if not places:
        return rng.choice(_VALUES), "another value as a whole"
    holder, key = rng.choice(places)
    if choice < 0.25:
        del holder[key]
        return content, f"without {key!r}"
    if choice < 0.35 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "\n", "__class__", "auto_map", "\ud800"])] = rng.choice(_VALUES)
        return content, "one key more"
    if choice < 0.5:
        other, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
        return content, f"{key!r} from {name!r}"
    if choice < 0.65 and type(holder[key]) in (int, float):
        holder[key] = rng.choice([-holder[key], holder[key] * 2, holder[key] + 1, str(holder[key])])
        return content, f"{key!r} as another number"
    holder[key] = rng.choice(_VALUES)
    return content, f"{key!r} as {str(holder[key])[:30]!r}"


def _places(content: Any):
    items = content.items() if isinstance(content, dict) else ()
    if isinstance(content, list):
        items = enumerate(content[:20])
    for key, value in list(items):
        yield content, key
        yield from _places(value)


def change_bytes(rng: random.Random, path: Path) -> str:
    """Change a file without regard to its content; return a description."""
    content = bytearray(path.read_bytes())
    choice = rng.randrange(7)
    place = rng.randrange(len(content) or 1)
    if choice == 0 and content:
        content[place] ^= 1 << rng.randrange(8)
        change = f"a flipped bit at {place}"
    elif choice == 1:
        del content[place:]
        change = f"cut at {place}"
    elif choice == 2:
        content[place:place] = rng.randbytes(rng.choice([1, 7, 4096]))
        change = f"more bytes at {place}"
    elif choice == 3:
        content = bytearray()
        change = "empty"
    elif choice == 4:
        content = bytearray(b"[" * 200_000)
        change = "brackets"
    elif choice == 5:
        content[:200] = rng.randbytes(200)
        change = "another beginning"
    else:
        content = bytearray(rng.randbytes(rng.choice([1, 100, 10_000])))
        change = "random bytes"
    path.write_bytes(content)
    return change


def replace_kind(rng: random.Random, path: Path) -> str:
    """Replace a file by something that is not a regular file; return a description."""
    path.unlink()
    choice = rng.randrange(7)
    if choice == 0:
        return "missing"
    if choice == 1:
        path.mkdir()
        return "a directory"
    if choice == 2:
        os.mkfifo(path)
        return "a named pipe"
    targets = ("/dev/zero", path.name, "/nowhere", "/proc/self/mem")
    path.symlink_to(targets[choice - 3])
    return f"a link to {targets[choice - 3]}"


def change_safetensors(rng: random.Random, path: Path) -> str:
    """Change the header of a safetensors file, with a fitting length; return a description."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, change = changed(rng, json.loads(content[8 : 8 + length]))
    text = to_text(header).encode(errors="surrogatepass")
    if rng.random() < 0.1:
        path.write_bytes(rng.randbytes(8) + text + content[8 + length :])
        return f"{change}, and another length"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return f"header {change}"


def change_array(rng: random.Random, path: Path) -> str:
    """Change the header of a .npy file; return a description."""
    content = path.read_bytes()
    text = rng.choice(
        (
            "(" * 300,
            "{'descr': '<f8', 'fortran_order': False, 'shape': (10**9, 10**9)}",
            "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
            "{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}",
            "{'descr': [('a', '<f8', (2**40,))], 'fortran_order': True, 'shape': (2,)}",
            "{'descr': '<i8', 'fortran_order': 3, 'shape': 'x'}",
            "\x00\x01",
            "__import__('os')",
            "{'descr': '" + "'" * 5,
        )
    )
    header = text.encode("latin1") + b"\n"
    start = 10 + int.from_bytes(content[8:10], "little")
    path.write_bytes(content[:8] + len(header).to_bytes(2, "little") + header + content[start:])
    return f"header {text[:40]!r}"


def sign_manifest(path: Path) -> None:
    """Give the file a correct checksum, if it is a manifest."""
    if not path.is_file():
        return
    try:
        body = json.loads(path.read_text())
        body.pop("checksum", None)
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        path.write_text(json.dumps({**body, "checksum": sha256(text.encode()).hexdigest()}))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return


def sign_store(folder: Path) -> None:
    """Give the folder correct checksums of its files, if it is a token store."""
    names = ("meta.json", "documents.npy", "checksums.npy")
    if not all((folder / name).is_file() for name in names):
        return
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for name in ("documents", "checksums"):
            meta[f"{name}_crc32"] = zlib.crc32((folder / f"{name}.npy").read_bytes())
        (folder / "meta.json").write_text(json.dumps(meta))
    except (OSError, ValueError, TypeError, RecursionError):
        return


def mutate(rng: random.Random, path: Path) -> str:
    """Change a file in a way that suits its kind; return a description."""
    choice = rng.random()
    if choice < 0.06:
        return replace_kind(rng, path)
    if choice < 0.25:
        return change_bytes(rng, path)
    by_suffix: dict[str, Callable[[random.Random, Path], str]] = {
        ".json": change_json,
        ".safetensors": change_safetensors,
        ".npy": change_array,
    }
    return by_suffix.get(path.suffix, change_bytes)(rng, path)


def remove(folder: Path) -> None:
    """Remove a folder with any content."""
    shutil.rmtree(folder, ignore_errors=True)
