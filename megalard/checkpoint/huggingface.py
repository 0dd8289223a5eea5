"""Reading a Hugging Face model directory: every rank reads only its own slices."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megalard.errors import UserError
from megalard.files.safetensors import DTYPES, DamagedFile, TensorFile, cannot_read
from megalard.parallel.tensor.layout import Layout


class HuggingFaceWeights:
    """The tensors of a directory of safetensors files, single or indexed.

    Raises:
        UserError: no safetensors files, a file that the index names is missing, cannot be read, is
            truncated or damaged, or a tensor that stands in two files.
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
        try:
            if index.exists():
                return self._indexed(index)
            files = sorted(self.directory.iterdir()) if self.directory.is_dir() else []
        except OSError as error:
            raise cannot_read(error.filename or self.directory, error) from None
        # beside it others lie in other formats of the same weights; dotfiles are file systems' own
        single = [path for path in files if path.name == "model.safetensors"]
        paths = single or [
            path
            for path in files
            if path.suffix == ".safetensors" and not path.name.startswith(".")
        ]
        if not paths:
            pickled = any(path.suffix == ".bin" for path in files)
            fix = "convert its .bin files to safetensors" if pickled else "check the path"
            raise UserError(f"{self.directory} has no .safetensors files: {fix}")
        return paths

    def _indexed(self, index: Path) -> list[Path]:
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{index} is not a safetensors index: download it again") from None
        missing = [name for name in sorted(names) if not (self.directory / name).is_file()]
        if missing:
            raise UserError(f"{self.directory} lacks {', '.join(missing)}, named by its index")
        return [self.directory / name for name in sorted(names)]

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
        index = slice(None)
        if layout is not None and layout.dim is not None:
            wanted = slice(layout.start, layout.start + layout.length)
            index = wanted if layout.dim == 0 else (slice(None), wanted)
        try:
            return part[index]
        except OSError as error:
            raise cannot_read(self._where[name], error) from None
        except DamagedFile as error:
            raise _damaged(self._where[name], error) from None

    def _slice(self, name: str):
        if name not in self._where:
            raise UserError(f"{self.directory} has no tensor {name}, which its config.json implies")
        return self._files[self._where[name]].get_slice(name)


def _open(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except OSError as error:
        raise cannot_read(path, error) from None
    except DamagedFile as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: DamagedFile) -> UserError:
    return UserError(f"{path} is truncated or damaged ({error}): fetch it again")
