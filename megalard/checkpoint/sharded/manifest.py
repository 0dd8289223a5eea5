"""``manifest.json``: what a sharded checkpoint holds, and the checks that it still holds it.

The format is described in docs/checkpoint_format.md. A directory is a complete checkpoint if it has
a manifest whose own checksum holds and every file the manifest names, in full length; the manifest
is the last file written, and the directory gets its name after it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megalard import __version__
from megalard.errors import UserError
from megalard.files.safetensors import DTYPES, cannot_read, file_sha256
from megalard.parallel.mesh import Mesh

MANIFEST = "manifest.json"
FORMAT, VERSION = "megalard checkpoint", 2
ID_KEY = "megalard_checkpoint"
_SECTIONS = ("kind", "config", "base", "trained", "training", "written_by", "tensors", "files")


@dataclass(frozen=True)
class Manifest:
    """A manifest as read.

    Attributes:
        directory: the checkpoint's.
        body: the JSON object.
    """

    directory: Path
    body: dict

    @property
    def kind(self) -> str:
        """``model`` (whole weights) or ``training`` (what is trained, and the run's state)."""
        return self.body["kind"]

    @property
    def config(self) -> dict:
        """The model's ``config.json``."""
        return self.body["config"]

    @property
    def base(self) -> dict | None:
        """Path and files of the model that the untrained weights are read from."""
        return self.body["base"]

    @property
    def teacher(self) -> dict | None:
        """The same of the teacher; None where it is the base."""
        return self.body.get("teacher")

    @property
    def trained(self) -> dict | None:
        """Which parameters were trained, and LoRA's settings."""
        return self.body["trained"]

    @property
    def training(self) -> dict | None:
        """Step, seed, data position, optimizer and the run's configuration."""
        return self.body["training"]

    @property
    def tensors(self) -> dict[str, dict]:
        """Name to dtype, shape and chunks (file, offsets, shape)."""
        return self.body["tensors"]

    @property
    def files(self) -> dict[str, dict]:
        """Name to size in bytes and sha256."""
        return self.body["files"]


def identity(head: dict) -> str:
    """What tells this checkpoint's files from another's: a digest of what it was made from."""
    return _digest(head)[:32]


def written_by(mesh: Mesh) -> dict:
    """Topology and library versions, for the manifest."""
    names = ("torch", "transformers", "safetensors", "numpy")
    return {
        "ranks": mesh.world.size,
        "dp": mesh.dp.size,
        "cp": mesh.cp.size,
        "tp": mesh.tp.size,
        "device": mesh.device.type,
        "libraries": {
            "megalard": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in names},
        },
    }


def write_manifest(directory: Path, body: dict) -> None:
    """Write the manifest with its own checksum, and wait until it is on the disk."""
    body = {"format": FORMAT, "version": VERSION, **body}
    body["checksum"] = _digest(body)
    text = json.dumps(body, indent=1, sort_keys=False) + "\n"
    with open(directory / MANIFEST, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def is_checkpoint(directory: str | Path) -> bool:
    """Whether the directory has a manifest, good or bad.

    Raises:
        UserError: the directory may not be entered.
    """
    try:
        return (Path(directory) / MANIFEST).is_file()
    except OSError as error:
        raise cannot_read(directory, error) from None


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check a manifest, and that every file is there in full length.

    Raises:
        UserError: there is none, it is damaged or of another version, a file is missing, cut short,
            or its name leads out of the directory, or a tensor's slices do not make it up.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} has no {MANIFEST}: it is no sharded checkpoint") from None
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not JSON; use another checkpoint") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a megalard checkpoint: check the path")
    if body.get("version") != VERSION:
        raise UserError(
            f"{directory} was written in version {body.get('version')} of the format and this "
            f"program reads version {VERSION}: use the megalard that wrote it"
        )
    checksum = body.pop("checksum", None)
    if checksum != _digest(body) or any(section not in body for section in _SECTIONS):
        raise UserError(f"{path} is damaged: its checksum does not hold; use another checkpoint")
    manifest = Manifest(directory, body)
    try:
        _check_kind(manifest)
        for name, file in manifest.files.items():
            _check_length(directory, name, file["size"])
            if not isinstance(file["sha256"], str):
                raise ValueError(f"the sha256 of {name} is no text")
        for name, tensor in manifest.tensors.items():
            _check_tensor(name, tensor, manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise incomplete(manifest, error) from None
    return manifest


def incomplete(manifest: Manifest, error: Exception) -> UserError:
    """The sentence about a manifest in which an entry is missing or is not what it should be."""
    what = f"it has no {error}" if isinstance(error, KeyError) else f"{error}"
    return UserError(
        f"{manifest.directory / MANIFEST} is not as megalard writes it ({what}): use another "
        "checkpoint"
    )


def _check_kind(manifest: Manifest) -> None:
    needed = {"model": [], "training": ["base", "trained", "training"]}
    if manifest.kind not in needed:
        raise ValueError(f"its kind is {manifest.kind!r}")
    sections = ("config", "written_by", "tensors", "files", *needed[manifest.kind])
    for section in sections:
        if not isinstance(manifest.body[section], dict):
            raise ValueError(f"its section {section} is no JSON object")
    if manifest.kind == "training":
        for note in filter(None, (manifest.base, manifest.teacher)):
            Path(note["path"])
            for file in note["files"].values():
                if type(file["size"]) is not int or type(file["sha256"]) is not str:
                    raise ValueError("a model it refers to has a file without size or sha256")
    if not isinstance(manifest.body["id"], str):
        raise ValueError("its id is no text")


def _check_tensor(name: str, tensor: dict, manifest: Manifest) -> None:
    """Refuse a tensor that its slices do not cover, each element once."""
    path, shape = manifest.directory / MANIFEST, tensor["shape"]
    if tensor["dtype"] not in DTYPES:
        raise UserError(
            f"{path} has the tensor {name} of dtype {tensor['dtype']}, which is not one of "
            f"{', '.join(DTYPES)}: use another checkpoint"
        )
    _check_numbers(name, shape)
    for chunk in tensor["chunks"]:
        if chunk["file"] not in manifest.files:
            raise UserError(
                f"{path} has a slice of {name} in {chunk['file']!r}, which is not among its files: "
                "use another checkpoint"
            )
        _check_numbers(name, chunk["offsets"])
        _check_numbers(name, chunk["shape"])
        corners = zip(chunk["offsets"], chunk["shape"], shape, strict=True)
        if any(offset + length > whole for offset, length, whole in corners):
            raise UserError(
                f"{path} has a slice of {name} at {chunk['offsets']} of shape {chunk['shape']}, "
                f"outside its shape {shape}: use another checkpoint"
            )
    chunks = [chunk for chunk in tensor["chunks"] if math.prod(chunk["shape"])]
    covered = sum(math.prod(chunk["shape"]) for chunk in chunks)
    if covered != math.prod(shape) or _overlap(chunks):
        raise UserError(
            f"{path} has slices of {name} that overlap or leave gaps in its shape {shape}: use "
            "another checkpoint"
        )


def _check_numbers(name: str, numbers: list) -> None:
    if type(numbers) is not list or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{numbers!r} is no shape or place of {name}")


def _overlap(chunks: list[dict]) -> bool:
    """Whether two boxes have an element in common."""
    if len(chunks) < 2:
        return False
    # along the dim with the most corners only neighbours can meet, however many slices there are
    places = list(zip(*(chunk["offsets"] for chunk in chunks), strict=True))
    if not places:
        return True
    dim = max(range(len(places)), key=lambda d: len(set(places[d])))
    ordered = sorted(chunks, key=lambda chunk: chunk["offsets"][dim])
    for number, one in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if other["offsets"][dim] >= one["offsets"][dim] + one["shape"][dim]:
                break
            boxes = zip(one["offsets"], one["shape"], other["offsets"], other["shape"], strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in boxes):
                return True
    return False


def _check_length(directory: Path, name: str, size: int) -> None:
    if Path(name).name != name or name == "..":
        raise UserError(f"{directory / MANIFEST} names the file {name!r} outside its directory")
    try:
        found = (directory / name).stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"{directory} lacks {name}, which its manifest names: restore the file, or use "
            "another checkpoint"
        ) from None
    except OSError as error:
        raise cannot_read(directory / name, error) from None
    if found != size:
        raise UserError(
            f"{directory / name} has {found} bytes, its manifest says {size}: restore the file, or "
            "use another checkpoint"
        )


def check_sums(
    directory: str | Path,
    files: Iterable[tuple[str, dict]],
    whose: str = "its manifest",
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Read files and compare their checksums.

    Args:
        directory: where the files are.
        files: names with ``size`` and ``sha256``.
        whose: what the expected checksum is from, for the sentence.

    Raises:
        UserError: naming the first file that differs or cannot be read.
    """
    for name, file in files:
        path = Path(directory) / name
        try:
            found = file_sha256(path, progress)
        except OSError as error:
            raise cannot_read(path, error) from None
        if found != file["sha256"]:
            raise UserError(
                f"{path} is damaged or of another model: its sha256 is {found[:12]}…, {whose} says "
                f"{file['sha256'][:12]}…; restore the file, or use another checkpoint"
            )


def _digest(value: dict) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
