"""The names that a checkpoint's pickles may contain: only DCP's own classes and PyTorch's tensors. torch is not needed.

A pickle can name any function of any module, and reading the pickle calls it. Digests do not help, since the author of a
checkpoint also creates its digests. So this file lists the permitted names. `METADATA` is for DCP's `.metadata`. `VALUES` is for
the tensors and plain values in the other files, and is a subset of what `torch.load(weights_only=True)` permits.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Collection, Iterator
from enum import EnumType
from pathlib import Path
from typing import Any, NamedTuple

from distattn.ir.errors import DamagedDataError

METADATA_FILE = ".metadata"
_DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("bfloat16", "float16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
_OF_TORCH = {("torch", "Size"), ("torch.serialization", "_get_layout")} | {("torch", name) for name in _DTYPES}
_DCP = "torch.distributed.checkpoint"
METADATA = _OF_TORCH | {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata")),
    *((f"{_DCP}.metadata", name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    # some versions of Python 3.11 use it to pickle members of enumerations; see `_enumeration_member`
    ("builtins", "getattr"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    # the class of the folder's path, which Python 3.13 moved to a different module
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
}
_STORAGES = ("Bool", "Byte", "Char", "Short", "Int", "Long", "BFloat16", "Half", "Float", "Double")
VALUES = _OF_TORCH | {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch.storage", "UntypedStorage"),
    *(("torch", f"{name}Storage") for name in (*_STORAGES, "ComplexFloat", "ComplexDouble")),
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    # needed for bytes in protocol-2 pickles
    ("_codecs", "encode"),
    ("builtins", "bytearray"),
    ("builtins", "set"),
}


class ForeignPickle(NamedTuple):
    """A pickle that is unreadable or dangerous to read. offset: where it starts in its file. text: a sentence."""

    file: str
    offset: int
    text: str


def refusal(path: Path, module: str, name: str) -> DamagedDataError:
    """Return the error for a pickle with a name that no checkpoint needs."""
    return DamagedDataError(
        f"{path}: names {module}.{name}, which no checkpoint of PyTorch's does and which could run code; it was not unpickled: "
        "do not use this folder, and ask who made it."
    )


def unreadable(path: Path) -> DamagedDataError:
    """Return the error for bytes that are not a checkpoint's pickle."""
    return DamagedDataError(f"{path}: cannot be read as a part of a checkpoint of PyTorch's; take another checkpoint.")


def foreign_pickles(folder: Path) -> Iterator[ForeignPickle]:
    """Yield a checkpoint's pickles that are unreadable or contain names that no checkpoint needs. No name is imported.

    Yields nothing for a folder without DCP's `.metadata`. Raises OSError on failure.
    """
    path = folder / METADATA_FILE
    try:
        metadata = _inert(path, path.read_bytes(), METADATA)
        items = [_Item(*_place(info)) for info in metadata.storage_data.values()]
    except FileNotFoundError:
        return
    except DamagedDataError as error:
        yield ForeignPickle(METADATA_FILE, 0, str(error))
        return
    except (AttributeError, TypeError):
        yield ForeignPickle(METADATA_FILE, 0, str(unreadable(path)))
        return
    for item in items:
        if Path(item.file).name != item.file:
            yield ForeignPickle(METADATA_FILE, 0, f"{path}: names {item.file}, which is not a file in this folder.")
            continue
        try:
            with open(folder / item.file, "rb") as opened:
                check_value(folder / item.file, _Part(opened, item.offset, item.length))
        except DamagedDataError as error:
            yield ForeignPickle(item.file, item.offset, str(error))


class _Item(NamedTuple):
    """The location of a tensor or a value: its file, and its byte range in the file."""

    file: str
    offset: int
    length: int


def _place(info: Any) -> tuple[str, int, int]:
    place = info.relative_path, info.offset, info.length
    if tuple(map(type, place)) != (str, int, int) or min(place[1:]) < 0:
        raise TypeError
    return place


def check_value(path: Path, part: Any) -> None:
    """Raise DamagedDataError if a part written by `torch.save` contains names outside `VALUES`.

    part: a file positioned at its start.

    `torch.load(weights_only=True)` alone is not enough, since other packages, such as Megatron-core, add names to PyTorch's
    allowlist.
    """
    try:
        with zipfile.ZipFile(part) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    # zipfile raises these errors for bytes that are not an archive
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError):
        raise unreadable(path) from None
    if not pickles:
        raise unreadable(path)
    for pickled in pickles:
        _inert(path, pickled, VALUES)


class _Inert:
    """A stand-in for everything that a pickle names. It accepts any arguments and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignore an item of a list."""

    def add(self, value: Any) -> None:
        """Ignore an item of a set."""


class _ListedUnpickler(pickle.Unpickler):
    """An unpickler that resolves only listed names."""

    def __init__(self, file: Any, path: Path, names: Collection[tuple[str, str]]):
        super().__init__(file)
        self._path, self._names = path, names

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that a pickle names. Raises DamagedDataError if the name is not listed."""
        if (module, name) not in self._names:
            raise refusal(self._path, module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enumeration_member
        # Python 3.13 names a module that older versions do not have
        return super().find_class("pathlib" if module.startswith("pathlib") else module, name)


def _enumeration_member(enumeration: Any, name: Any) -> Any:
    """Return an enumeration's member by name. Raises ValueError if `enumeration` is not an enumeration."""
    if not isinstance(enumeration, EnumType):
        raise ValueError("not an enumeration")
    return enumeration[name]


class _InertUnpickler(_ListedUnpickler):
    """An unpickler that replaces every named object with `_Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        """Return `_Inert` for every listed name. Raises DamagedDataError if the name is not listed."""
        if (module, name) not in self._names:
            raise refusal(self._path, module, name)
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        """Return None, since the tensors' elements are stored elsewhere."""


def load_metadata(file: Any, path: Path) -> Any:
    """Return DCP's metadata from an open file. Raises DamagedDataError if it is not a pickle or contains unlisted names."""
    return _load(_ListedUnpickler(file, path, METADATA), path)


def _inert(path: Path, content: bytes, names: Collection[tuple[str, str]]) -> Any:
    """Unpickle without importing any name. Raises DamagedDataError for invalid bytes and unlisted names."""
    return _load(_InertUnpickler(io.BytesIO(content), path, names), path)


def _load(unpickler: pickle.Unpickler, path: Path) -> Any:
    try:
        return unpickler.load()
    except (DamagedDataError, OSError):
        raise
    # bytes that are not a pickle may raise almost any error
    except Exception:
        raise unreadable(path) from None


class _Part(io.RawIOBase):
    """A part of an open file, readable as a file."""

    def __init__(self, file: Any, offset: int, length: int):
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a position and return it. Raises ValueError for a position before the start."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError("before the beginning")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer. Return the number of bytes read: 0 at the end of the part."""
        bytes_left = max(self._length - self._position, 0)
        self._file.seek(self._offset + self._position)
        content = self._file.read(min(len(buffer), bytes_left))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
