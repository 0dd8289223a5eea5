"""Reading a Hugging Face model directory: every rank reads only its own slices."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megalard.checkpoint.tensor_file import DTYPES, DamagedFile, TensorFile
from megalard.errors import UserError
from megalard.parallel.layout import Layout


class HuggingFaceWeights:
    """The tensors of a directory of safetensors files, single or indexed.

    Raises:
        UserError: no safetensors files, a file that the index names is missing, a truncated or
            damaged file, or a tensor that stands in two files.
    """

    def __init__(self, model_dir: str | Path):
        self.directory = Path(model_dir)
        self._files = {path: _open(path) for path in self._paths()}
        self._where: dict[str, Path] = {}
        for path, file in self._files.items():
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if name in self._where:
                    raise UserError(
                        f"tensor {name} stands in both {self._where[name].name} and {path.name} of "
                        f"{self.directory}: remove the file that does not belong there"
                    )
                self._where[name] = path

    def _paths(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{index} is not a safetensors index: download it again") from None
            missing = [name for name in names if not (self.directory / name).is_file()]
            if missing:
                raise UserError(f"{self.directory} lacks {', '.join(missing)}, named by its index")
            return [self.directory / name for name in names]
        paths = sorted(self.directory.glob("*.safetensors"))
        if not paths:
            pickled = any(self.directory.glob("*.bin"))
            fix = "convert its .bin files to safetensors" if pickled else "check the path"
            raise UserError(f"{self.directory} has no .safetensors files: {fix}")
        return paths

    def names(self) -> list[str]:
        """All tensor names, in the order of the files."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full tensor; it is a UserError if there is none of this name."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype in the file."""
        return DTYPES[self._slice(name).get_dtype()]

    def files(self) -> list[Path]:
        """The files the tensors stand in."""
        return list(self._files)

    def read(self, name: str, layout: Layout | None = None) -> torch.Tensor:
        """The tensor, or this rank's slice of it, in the file's dtype, on the CPU."""
        part = self._slice(name)
        if layout is None or layout.dim is None:
            return part[:]
        stop = layout.start + layout.length
        return part[layout.start : stop] if layout.dim == 0 else part[:, layout.start : stop]

    def _slice(self, name: str):
        if name not in self._where:
            raise UserError(f"{self.directory} has no tensor {name}, which its config.json implies")
        return self._files[self._where[name]].get_slice(name)


def _open(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except (DamagedFile, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): fetch it again") from None
