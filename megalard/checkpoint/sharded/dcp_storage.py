"""Where ``torch.distributed.checkpoint`` puts tensors: safetensors shards and a JSON manifest.

torch plans (which rank writes which slice, each slice once; which saved slices a rank has to read
for its own) and these two classes store. Nothing is pickled into a file or unpickled from one. The
shards carry the offsets of their slices under the key torch's own Hugging Face storage uses, so
``torch.distributed.checkpoint.HuggingFaceStorageReader`` reads them too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

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

from megalard.checkpoint.sharded.manifest import ID_KEY, Manifest, identity, write_manifest
from megalard.files.atomic_folder import PartialFolder
from megalard.files.safetensors import (
    DTYPES,
    NAMES,
    Entry,
    file_sha256,
    in_file_order,
    read_ahead,
    write_tensor_file,
)

SHARDING_KEY, OFFSETS_KEY = "DCP_SHARDING_INFO", "saved_offsets"
STATE_PREFIXES = ("optimizer.", "rng.")
FILE_BYTES = 4 * 2**30


def _ready(value) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


class ShardWriter(StorageWriter):
    """Writes a checkpoint beside its final name, which it is to get once all is on the disk.

    Args:
        directory: the checkpoint's final name.
        head: everything the manifest says but for tensors and files; the same on every rank.
        companions: files copied beside the shards (tokenizer, generation settings).
        file_bytes: a shard ends before it would exceed this, unless one tensor alone does.
        progress: called with the number of bytes of each part written by this rank.
    """

    def __init__(
        self,
        directory: Path,
        head: dict,
        companions: Iterable[Path] = (),
        file_bytes: int = FILE_BYTES,
        progress: Callable[[int], None] = lambda count: None,
    ):
        self.directory, self.head = Path(directory), head
        self.companions, self.file_bytes, self.progress = list(companions), file_bytes, progress
        self.folder = PartialFolder(self.directory)
        self.partial = self.folder.path
        self.identity = identity(head)

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
        return [dataclasses.replace(plan, storage_data=number) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not self.partial.is_dir():
            raise FileNotFoundError(
                2, "another rank made it; is it on a disk that all machines share?", self.partial
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
            for number, names in enumerate(split_by_size(members, self.file_bytes)):
                file = f"{group}-{plan.storage_data:05d}-{number:03d}.safetensors"
                entries = {
                    name: members[name] for name in in_file_order({n: members[n] for n in names})
                }
                results += self._write_file(file, entries, items, planner)
        return _ready(results)

    def _write_file(self, file, entries, items: dict[str, WriteItem], planner) -> list[WriteResult]:
        offsets = {name: {OFFSETS_KEY: list(items[name].index.offset)} for name in entries}
        metadata = {"format": "pt", SHARDING_KEY: json.dumps(offsets), ID_KEY: self.identity}
        tensors = (planner.resolve_data(items[name]) for name in entries)
        if isinstance(planner, LazySavePlanner):
            tensors = read_ahead(tensors)
        size, digest = write_tensor_file(
            self.partial / file, entries, tensors, metadata, self.progress
        )
        where = {"file": file, "size": size, "sha256": digest}
        return [WriteResult(items[name].index, entries[name].nbytes, where) for name in entries]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The coordinator's last act: companions and manifest."""
        tensors: dict[str, dict] = {}
        files: dict[str, dict] = {}
        for result in (result for part in results for result in part):
            name, where = result.index.fqn, result.storage_data
            saved = metadata.state_dict_metadata[name]
            tensor = tensors.setdefault(
                name,
                {"dtype": NAMES[saved.properties.dtype], "shape": list(saved.size), "chunks": []},
            )
            chunk = next(c for c in saved.chunks if c.offsets == result.index.offset)
            tensor["chunks"].append(
                {
                    "file": where["file"],
                    "offsets": list(chunk.offsets),
                    "shape": list(chunk.sizes),
                }
            )
            files[where["file"]] = {"size": where["size"], "sha256": where["sha256"]}
        files |= self._copy_companions()
        body = {**self.head, "id": self.identity, "tensors": dict(sorted(tensors.items()))}
        write_manifest(self.partial, {**body, "files": dict(sorted(files.items()))})

    def _copy_companions(self) -> dict[str, dict]:
        (self.partial / "config.json").write_text(json.dumps(self.head["config"], indent=2) + "\n")
        for source in self.companions:
            shutil.copyfile(source, self.partial / source.name)
        files = {}
        for name in {"config.json", *(source.name for source in self.companions)}:
            path = self.partial / name
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        return files


class LazySavePlanner(DefaultSavePlanner):
    """Plans from tensors without storage and fetches each slice when it is written.

    Args:
        read: gives a tensor's box from its name, its offsets and its size.
    """

    def __init__(self, read: Callable[[str, tuple[int, ...], tuple[int, ...]], torch.Tensor]):
        super().__init__(flatten_state_dict=False)
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        chunk = write_item.tensor_data.chunk
        return self._read(write_item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes))


class ShardReader(StorageReader):
    """Gives torch the slices of a checkpoint; ``read_box`` is ``ShardedWeights``'s."""

    def __init__(self, manifest: Manifest, read_chunk: Callable):
        self.manifest, self.read_chunk = manifest, read_chunk

    def reset(self, checkpoint_id=None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return False

    def read_metadata(self, *args, **kwargs) -> Metadata:
        tensors, chunks = {}, {}
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
        return _ready(None)


def _entry(item: WriteItem) -> Entry:
    data = item.tensor_data
    return Entry(data.properties.dtype, tuple(data.chunk.sizes))


def split_by_size(entries: dict[str, Entry], file_bytes: int) -> list[list[str]]:
    """Names in their order, cut into files of at most ``file_bytes`` or one tensor."""
    files: list[list[str]] = []
    held = 0
    for name, entry in entries.items():
        if not files or held + entry.nbytes > file_bytes:
            files.append([])
            held = 0
        files[-1].append(name)
        held += entry.nbytes
    return files
