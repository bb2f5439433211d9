"""Reading the tensors of a checkpoint that one does not trust.

A folder of `torch.distributed.checkpoint` holds a pickle, ``.metadata``, which its own reader
executes. Here that pickle may name a short list of harmless types and nothing else, tensors are
loaded with ``weights_only``, and no file outside the folder is opened.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from torchrec_hilomoe.errors import CheckpointError

_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")
_METADATA_TYPES: tuple[type, ...] = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    torch.Size,
)


def _refused(name: str) -> CheckpointError:
    return CheckpointError(
        f"its metadata name {name}, which no checkpoint of this library does; it may be an attack: "
        "do not use it"
    )


def _member(cls: Any, name: str) -> metadata._MEM_FORMAT_ENCODING:
    """Stands for ``getattr``, by which early releases of Python 3.11 pickle members of an Enum."""
    if cls is not metadata._MEM_FORMAT_ENCODING:
        raise _refused("builtins.getattr")
    return cls[name]


def _path(*parts: str) -> str:
    """Where the checkpoint was written: a value that is never used."""
    return "/".join(parts)


_ALLOWED: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__qualname__): cls for cls in _METADATA_TYPES},
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    ("builtins", "getattr"): _member,
    **{
        (module, name): _path
        for module in ("pathlib", "pathlib._local")  # the latter in Python 3.13
        for name in ("PosixPath", "WindowsPath")
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the types of DCP's metadata; anything else is an error before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _refused(f"{module}.{name}") from None


def read_metadata(weights: Path) -> metadata.Metadata:
    """Reads what tensors a DCP folder holds, without executing its pickle.

    Args:
        weights (Path): the DCP folder.

    Returns:
        Metadata: names, shapes, and in which files the pieces are.

    Raises:
        CheckpointError: the metadata are damaged, or name anything that is not of DCP.
    """
    path = weights / ".metadata"
    try:
        content = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        files = {info.relative_path for info in content.storage_data.values()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle fails in any way
        raise CheckpointError(f"{path}: cannot be read: {error!r}") from None
    strange = sorted(str(name) for name in files if not _DATA_FILE.fullmatch(str(name)))
    if strange:
        raise CheckpointError(f"{path}: names {strange[0]!r}, which is no data file of its folder")
    content.storage_meta = content.storage_meta or metadata.StorageMeta()
    return content


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, with its metadata read by `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Overrides the reader's way to the metadata."""
        content = read_metadata(Path(self.path))
        content.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return content


class TensorsOnlyPlanner(DefaultLoadPlanner):
    """DCP's planner, refusing what is no tensor: it would be unpickled."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Overrides the planner's unpickling."""
        raise CheckpointError(f"{read_item.dest_index.fqn}: is no tensor and is not loaded")


def load_tensors(state: dict[str, Any], weights: Path, no_dist: bool = False) -> None:
    """Loads the tensors that ``state`` holds, in place. Every rank must call it.

    Args:
        state (dict[str, Any]): nested dicts of tensors, sharded or not.
        weights (Path): the DCP folder, written under any world size and plan.
        no_dist (bool): this process loads for itself, whether or not others do.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or cannot be read; raised on
            every rank.
    """
    try:
        dcp.load(
            state,
            storage_reader=SafeReader(weights),
            planner=TensorsOnlyPlanner(),
            no_dist=no_dist,
        )
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{weights}: {first_failure(error)}") from None


def first_failure(error: dcp.CheckpointException) -> str:
    """The first rank's failure in one line.

    Args:
        error (CheckpointException): DCP's account of the failures of all ranks.

    Returns:
        str: rank and reason.
    """
    rank, (failure, _) = min(error.failures.items())
    return f"rank {rank}: {failure}" if str(failure) else f"rank {rank}: {failure!r}"
