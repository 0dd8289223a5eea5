"""Where ``torch.distributed.checkpoint`` stores tensors: safetensors shards and a JSON manifest.

torch plans which rank writes which slice, so that every slice is written once, and which saved
slices a rank must read for its own. The two classes here store and fetch the slices. Nothing is
pickled into a file or unpickled from one. The shards carry the offsets of their slices under the
key that torch's Hugging Face storage uses, so that
``torch.distributed.checkpoint.HuggingFaceStorageReader`` can read them too.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megalard.checkpoint.sharded.manifest import (
    ID_KEY,
    STATE_PREFIXES,
    Box,
    Manifest,
    identity,
    write_manifest,
)
from megalard.checkpoint.write_options import WriteOptions, split_by_size
from megalard.files.atomic_folder import AtomicFolder
from megalard.files.safetensors import (
    DTYPES,
    NAMES,
    Entry,
    in_file_order,
    read_ahead,
    write_tensor_file,
)
from megalard.files.writing import file_sha256

SHARDING_KEY, OFFSETS_KEY = "DCP_SHARDING_INFO", "saved_offsets"


def _completed(value) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


class ShardWriter(StorageWriter):
    """Writes a checkpoint to ``NAME.partial``. The caller renames it to ``NAME`` after fsync.

    Attributes:
        folder: the directory that is being written.

    Args:
        directory: the final name of the checkpoint.
        sections: all sections of the manifest except tensors and files; the same on every rank.
        options: companion files, size of the shards, and progress.
    """

    def __init__(self, directory: Path, sections: dict, options: WriteOptions):
        self.sections, self.options = sections, options
        self.folder = AtomicFolder(Path(directory))
        self.identity = identity(sections)

    def reset(self, checkpoint_id=None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None:
        if is_coordinator:
            self.folder.begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not self.folder.path.is_dir():
            raise FileNotFoundError(
                2,
                "rank 0 made this directory: choose a place on a disk that all machines share",
                self.folder.path,
            )
        items = {item.index.fqn: item for item in plan.items}
        assert len(items) == len(plan.items), "a rank holds one slice of a tensor"
        results = []
        for group in ("weights", "optimizer"):
            members = {
                name: _entry(item)
                for name, item in items.items()
                if name.startswith(STATE_PREFIXES) == (group == "optimizer")
            }
            sizes = {name: entry.nbytes for name, entry in members.items()}
            for number, names in enumerate(split_by_size(sizes, self.options.file_bytes)):
                file = f"{group}-{plan.storage_data:05d}-{number:03d}.safetensors"
                entries = {
                    name: members[name] for name in in_file_order({n: members[n] for n in names})
                }
                results += self._write_file(file, entries, items, planner)
        return _completed(results)

    def _write_file(
        self,
        file: str,
        entries: dict[str, Entry],
        items: dict[str, WriteItem],
        planner: SavePlanner,
    ) -> list[WriteResult]:
        offsets = {name: {OFFSETS_KEY: list(items[name].index.offset)} for name in entries}
        metadata = {"format": "pt", SHARDING_KEY: json.dumps(offsets), ID_KEY: self.identity}
        tensors: Iterator[Any] = (planner.resolve_data(items[name]) for name in entries)
        if isinstance(planner, LazySavePlanner):
            tensors = read_ahead(tensors)
        size, digest = write_tensor_file(
            self.folder.path / file, entries, tensors, metadata, self.options.progress
        )
        stored = {"file": file, "size": size, "sha256": digest}
        return [WriteResult(items[name].index, entries[name].nbytes, stored) for name in entries]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write companion files and the manifest; torch calls this on rank 0 at the end."""
        tensors: dict[str, dict] = {}
        files: dict[str, dict] = {}
        for result in (result for part in results for result in part):
            name, stored = result.index.fqn, result.storage_data
            saved: Any = metadata.state_dict_metadata[name]
            tensor = tensors.setdefault(
                name,
                {"dtype": NAMES[saved.properties.dtype], "shape": list(saved.size), "chunks": []},
            )
            chunk = next(c for c in saved.chunks if c.offsets == result.index.offset)
            tensor["chunks"].append(
                {
                    "file": stored["file"],
                    "offsets": list(chunk.offsets),
                    "shape": list(chunk.sizes),
                }
            )
            files[stored["file"]] = {"size": stored["size"], "sha256": stored["sha256"]}
        files |= self._write_companions()
        body = {**self.sections, "id": self.identity, "tensors": dict(sorted(tensors.items()))}
        write_manifest(self.folder.path, {**body, "files": dict(sorted(files.items()))})

    def _write_companions(self) -> dict[str, dict]:
        folder, companions = self.folder.path, self.options.companions
        (folder / "config.json").write_text(json.dumps(self.sections["config"], indent=2) + "\n")
        for companion in companions:
            companion.write(folder)
        files = {}
        for name in {"config.json", *(companion.name for companion in companions)}:
            path = folder / name
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        return files


class LazySavePlanner(DefaultSavePlanner):
    """Plans from tensors without storage, and fetches each slice when it is written.

    Args:
        read: returns a box of a tensor, given its name, its offsets and its size.
    """

    def __init__(self, read: Callable[[str, Box, Box], torch.Tensor]):
        super().__init__(flatten_state_dict=False)
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        chunk = write_item.tensor_data.chunk
        return self._read(write_item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes))


class ShardReader(StorageReader):
    """Gives torch the slices of a checkpoint.

    Args:
        manifest: the manifest of the checkpoint.
        read_chunk: ``ShardedWeights.read_chunk``.
    """

    def __init__(self, manifest: Manifest, read_chunk: Callable[..., torch.Tensor]):
        self.manifest, self.read_chunk = manifest, read_chunk

    def reset(self, checkpoint_id=None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return False

    def read_metadata(self, *args, **kwargs) -> Metadata:
        tensors: dict[str, Any] = {}
        chunks = {}
        for name, tensor in self.manifest.tensors.items():
            boxes = []
            for chunk in tensor["chunks"]:
                offsets = torch.Size(chunk["offsets"])
                boxes.append(ChunkStorageMetadata(offsets, torch.Size(chunk["shape"])))
                chunks[MetadataIndex(name, offsets)] = chunk["file"]
            properties = TensorProperties(dtype=DTYPES[tensor["dtype"]])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), boxes)
        return Metadata(tensors, storage_data=chunks)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args, **kwargs
    ) -> None:
        self.files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            file = self.files[item.storage_index]
            value = self.read_chunk(
                file, item.storage_index.fqn, tuple(item.storage_offsets), tuple(item.lengths)
            )
            target = planner.resolve_tensor(item).detach()
            target.copy_(value)
            planner.commit_tensor(item, target)
        return _completed(None)


def _entry(item: WriteItem) -> Entry:
    data = item.tensor_data
    return Entry(data.properties.dtype, tuple(data.chunk.sizes))
