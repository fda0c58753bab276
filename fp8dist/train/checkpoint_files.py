"""Reading checkpoint files that may be damaged or hostile: nothing in them is run."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

# What torch's metadata files are made of. Anything else that a pickle names could run code.
_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """torch's reader, which unpickles a metadata file without asking what is in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's planner, which unpickles what is no tensor without asking what is in it."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        again = io.BytesIO()
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)


class _Target(torch.Tensor):
    """Where torch's reader copies an entry to, which would convert any dtype silently."""

    entry: str

    def detach(self) -> "_Target":
        return self

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> "_Target":
        if source.dtype != self.dtype:
            raise ValueError(f"{self.entry} is {source.dtype}, its metadata says {self.dtype}")
        super().copy_(source)
        return self


class Rehearsal(SafePlanner):
    """Reads every tensor that this rank would load, and drops it."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        name = read_item.storage_index.fqn
        if self.metadata is None:
            raise AssertionError("a tensor is read before the metadata")
        entry = self.metadata.state_dict_metadata[name]
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
        saved = entry.properties.dtype
        wanted = self.lookup_tensor(read_item.dest_index).dtype
        if saved.is_floating_point != wanted.is_floating_point:
            raise ValueError(f"{name} is {saved}, which cannot be loaded as {wanted}")
        target = torch.empty(tuple(read_item.lengths), dtype=saved).as_subclass(_Target)
        target.entry = name
        return target


def check_files(folder: Path, metadata: Metadata) -> None:
    """Raise ValueError unless all that metadata points at is in files of this folder."""
    sizes: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        name = place.relative_path
        if Path(name).name != name:
            raise ValueError(f"{index.fqn} should be in {name!r}, which is no file of its own")
        if name not in sizes:
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing")
            sizes[name] = (folder / name).stat().st_size
        if not 0 <= place.offset <= place.offset + place.length <= sizes[name]:
            raise ValueError(
                f"{name} has {sizes[name]} bytes: it was cut off before the end of {index.fqn}"
            )
