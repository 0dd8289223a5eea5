"""``manifest.json``: what a sharded checkpoint contains, and checks that it still contains it.

docs/checkpoint_format.md describes the format. A directory is a complete checkpoint if it has a
manifest whose own checksum holds, and every file that the manifest names in its full length. The
manifest is the last file that is written; the directory gets its final name after that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath

from megalard import __version__
from megalard.errors import UserError, shown
from megalard.files.reading import cannot_read, read_json
from megalard.files.safetensors import DTYPES
from megalard.parallel.mesh import Mesh

MANIFEST = "manifest.json"
FORMAT, VERSION = "megalard checkpoint", 2
ID_KEY = "megalard_checkpoint"
# The names of the tensors in a run's checkpoint that are not weights begin with one of these.
STATE_PREFIXES = ("optimizer.", "rng.")
Box = tuple[int, ...]
_SECTIONS = ("kind", "config", "base", "trained", "training", "written_by", "tensors", "files")


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been read.

    Attributes:
        directory: the directory of the checkpoint.
        body: the JSON object.
    """

    directory: Path
    body: dict

    @property
    def kind(self) -> str:
        """``model`` (full weights) or ``training`` (the trained tensors and the state of a run)."""
        return self.body["kind"]

    @property
    def config(self) -> dict:
        """The ``config.json`` of the model."""
        return self.body["config"]

    @property
    def base(self) -> dict | None:
        """Path and files of the model that untrained weights are read from."""
        return self.body["base"]

    @property
    def teacher(self) -> dict | None:
        """Path and files of the teacher; None if the teacher is the base."""
        return self.body.get("teacher")

    @property
    def trained(self) -> dict | None:
        """Which parameters were trained, and LoRA's settings."""
        return self.body["trained"]

    @property
    def training(self) -> dict | None:
        """Step, seed, position in the data, optimizer, and the configuration of the run."""
        return self.body["training"]

    @property
    def tensors(self) -> dict[str, dict]:
        """Tensor name to dtype, shape and slices (file, offsets, shape)."""
        return self.body["tensors"]

    @property
    def files(self) -> dict[str, dict]:
        """File name to size in bytes and sha256."""
        return self.body["files"]


def identity(sections: dict) -> str:
    """Return the id that all files of a checkpoint share: a digest of what it was made from."""
    return _digest(sections)[:32]


def written_by(mesh: Mesh) -> dict:
    """Return the layout of ranks and the versions of libraries, for the manifest."""
    return {
        "ranks": mesh.world.size,
        "dp": mesh.dp.size,
        "cp": mesh.cp.size,
        "tp": mesh.tp.size,
        "device": mesh.device.type,
        "libraries": {
            "megalard": __version__,
            "python": platform.python_version(),
            **_versions_of_packages(),
        },
    }


@cache
def _versions_of_packages() -> dict[str, str]:
    """Return the versions of the packages that write a checkpoint; finding them takes a while."""
    names = ("torch", "transformers", "safetensors", "numpy")
    return {name: metadata.version(name) for name in names}


def write_manifest(directory: Path, body: dict) -> None:
    """Write the manifest with its own checksum and wait until it is on the disk."""
    body = {"format": FORMAT, "version": VERSION, **body}
    body["checksum"] = _digest(body)
    text = json.dumps(body, indent=1, sort_keys=False) + "\n"
    with open(directory / MANIFEST, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def is_checkpoint(directory: str | Path) -> bool:
    """Whether a directory has a manifest, valid or not.

    Raises:
        UserError: the directory may not be read.
    """
    try:
        return (Path(directory) / MANIFEST).is_file()
    except OSError as error:
        raise cannot_read(directory, error) from None


def read_manifest(directory: str | Path) -> Manifest:
    """Read a manifest, and check that every file it names is there in its full length.

    Raises:
        UserError: there is no manifest, it is damaged or has another version, a file is missing,
            has another length or lies outside the directory, or the slices of a tensor do not
            cover it.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    try:
        body = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no {MANIFEST}, so it is not a sharded checkpoint: check the path"
        ) from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON; use another checkpoint") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a megalard checkpoint: check the path")
    if body.get("version") != VERSION:
        raise UserError(
            f"{directory} was written in version {shown(body.get('version'))} of the format and "
            f"this program reads version {VERSION}: use the megalard that wrote it"
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
                raise ValueError(f"the sha256 of {name} is not text")
        for name, tensor in manifest.tensors.items():
            _check_tensor(name, tensor, manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise incomplete(manifest, error) from None
    return manifest


@contextmanager
def naming_bad_entries(manifest: Manifest) -> Iterator[None]:
    """Raise an error about the manifest if the block meets an entry that is missing or wrong."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise incomplete(manifest, error) from None


def check_run(manifest: Manifest) -> None:
    """Refuse a run's checkpoint without the entries that a run is resumed from.

    Raises:
        UserError: an entry is missing or has another type; the message names the first one.
    """
    training, writer = manifest.body["training"], manifest.body["written_by"]
    places: list[tuple[str, dict, str, type]]
    places = [("training", training, key, dict) for key in ("data", "optimizer", "config")]
    places += [("training", training, "step", int), ("written_by", writer, "ranks", int)]
    with naming_bad_entries(manifest):
        for section, content, key, kind in places:
            if type(content[key]) is not kind:
                raise ValueError(f"{section}.{key} is {shown(content[key])}")
        if type(training["optimizer"]["groups"][0]) is not dict:
            raise ValueError("training.optimizer has no groups")


def incomplete(manifest: Manifest, error: Exception) -> UserError:
    """Return the error about a manifest in which an entry is missing or wrong."""
    reason = f"it has no {error}" if isinstance(error, KeyError) else f"{error}"
    return UserError(
        f"{manifest.directory / MANIFEST} is not as megalard writes it ({reason}): use another "
        "checkpoint"
    )


def _check_kind(manifest: Manifest) -> None:
    sections_of_kind = {"model": [], "training": ["base", "trained", "training"]}
    if manifest.kind not in sections_of_kind:
        raise ValueError(f"its kind is {shown(manifest.kind)}")
    sections = ("config", "written_by", "tensors", "files", *sections_of_kind[manifest.kind])
    for section in sections:
        if not isinstance(manifest.body[section], dict):
            raise ValueError(f"its section {section} is not a JSON object")
    if manifest.kind == "model" and any(
        manifest.body.get(section) is not None for section in ("base", "teacher", "training")
    ):
        raise ValueError("a whole model has no base, teacher or training")
    if manifest.kind == "training":
        for note in filter(None, (manifest.base, manifest.teacher)):
            Path(note["path"])
            for file in note["files"].values():
                if type(file["size"]) is not int or type(file["sha256"]) is not str:
                    raise ValueError("a file of a model that it refers to has no size or sha256")
    if not isinstance(manifest.body["id"], str):
        raise ValueError("its id is not text")


def _check_tensor(name: str, tensor: dict, manifest: Manifest) -> None:
    """Refuse a tensor unless its slices cover each element exactly once."""
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
                f"{path} has a slice of {name} in {shown(chunk['file'])}, which is not among its "
                "files: use another checkpoint"
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
        raise ValueError(f"{shown(numbers)} is not a shape or an offset of {name}")


def _overlap(chunks: list[dict]) -> bool:
    """Whether two of the boxes have an element in common."""
    if len(chunks) < 2:
        return False
    # Sorted along the dim with the most different offsets, only neighbors can overlap. The check is
    # therefore fast for any number of slices.
    offsets = list(zip(*(chunk["offsets"] for chunk in chunks), strict=True))
    if not offsets:
        return True
    dim = max(range(len(offsets)), key=lambda d: len(set(offsets[d])))
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
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == ".":
        raise UserError(
            f"{directory / MANIFEST} names the file {shown(name)} outside its directory: use "
            "another checkpoint"
        )
    try:
        actual_size = (directory / name).stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"{directory} lacks {name}, which its manifest names: restore the file, or use "
            "another checkpoint"
        ) from None
    except OSError as error:
        raise cannot_read(directory / name, error) from None
    if actual_size != size:
        raise UserError(
            f"{directory / name} has {actual_size} bytes, its manifest says {size}: restore the "
            "file, or use another checkpoint"
        )


def _digest(value: dict) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
