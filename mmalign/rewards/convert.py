"""Tensors out of third-party pickles without running their code.

A restricted unpickler builds tensors and plain containers itself; every other class becomes an inert record of its
attributes, so a pickled module turns into a tree in which the parameters are found by name. Nothing is ever called.
Both of torch's file formats are read: the zip archive, and the row of pickles of releases before 1.6.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from mmalign.errors import ModelError

_STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
MAX_DEPTH = 200
MAX_PICKLE = 32 * 1024 * 1024
"""Bytes of the pickle itself, which holds names and structure; the numbers lie outside it."""
MAX_NODES = 1_000_000
"""Objects looked at in search of tensors: a few bytes can describe a tree that refers to itself again and again."""
MAX_GROWTH = 8
"""Bytes of all tensors over those of the file: views of one storage are written out one by one."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DAMAGES = (zipfile.BadZipFile, OSError, KeyError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError,
            IndexError, RuntimeError, MemoryError, OverflowError, NotImplementedError)  # fmt: skip


class Inert:
    """Stands for an object of any class: remembers what it was given, does nothing."""

    state: Any = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def update(self, *values: Any) -> None:
        pass


class _Storage:
    """A block of numbers of one type; tensors are views of it."""

    def __init__(self, data: bytes, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.numbers = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not isinstance(storage, _Storage):
        raise ModelError("a tensor of the checkpoint has no storage")
    # as_strided checks nothing by itself: a forged stride must not read beyond the block.
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min((*size, *stride, offset, 0)) < 0 or (0 not in size and last >= len(storage.numbers)):
        raise ModelError("a tensor of the checkpoint lies outside its storage")
    if 0 in size:
        return torch.empty(size, dtype=storage.dtype)
    return torch.as_strided(storage.numbers, size, stride, offset)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _of_type(build: Any, kind: Any, arguments: tuple[Any, ...], *_: Any) -> Any:
    """A tensor of some subclass, or with attributes: the plain tensor."""
    return build(*arguments) if build in (_tensor, _parameter) else Inert()


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


# The pure Python reader: the C one takes memory for whatever sizes a pickle claims before it looks at the bytes.
class _Restricted(pickle._Unpickler):
    """Classes and functions are looked up in a fixed table; whatever is not there is inert.

    Args:
        block: from a storage's key, type and number of elements to its bytes.
    """

    # Without the one operation that takes memory by claim in this reader too; torch writes no bytearrays.
    dispatch: ClassVar = {code: read for code, read in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def __init__(self, stream: Any, block: Callable[[str, torch.dtype, int], bytes]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._block = block
        self._blocks: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch._utils" and name.startswith("_rebuild"):
            raise ModelError(f"the checkpoint holds a tensor of a kind that is not converted ({name.removeprefix('_rebuild_')})")
        # A fresh class each time: pickles may set attributes on classes.
        return type(name, (Inert,), {"__module__": "mmalign.rewards.convert"})

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # the old format keeps classes this way, with their source
            return pid[1]
        kind, dtype, key, count = pid[0], pid[1], str(pid[2]), pid[4]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ModelError(f"the checkpoint refers to something that is no storage: {kind!r}")
        if key not in self._blocks:
            self._blocks[key] = _Storage(self._block(key, dtype, int(count)), dtype)
        if self._blocks[key].dtype != dtype:
            raise ModelError(f"storage {key} of the checkpoint has two types")
        return self._blocks[key]


class _Survey(_Restricted):
    """A first reading of an old file: which storages will follow, and of which type."""

    def find_class(self, module: str, name: str) -> Any:
        return Inert if module in ("torch._utils", "torch._tensor") else super().find_class(module, name)


def read_pickled_tensors(source: Path) -> dict[str, Tensor]:
    """Every tensor of a ``torch.save`` file by its dotted name, whatever classes the file mentions.

    Buffers that a module does not count among its state are left out, as by its ``state_dict``.

    Raises:
        ModelError: no torch file, damaged, without tensors, or made to fill the memory.
    """
    try:
        tree = _from_archive(source) if zipfile.is_zipfile(source) else _from_row(source)
    except _DAMAGES as error:
        raise ModelError(f"{source} cannot be read as a torch checkpoint: {type(error).__name__}: {error}") from error
    found: dict[str, Tensor] = {}
    for name, value in _Walk(tree):
        if name in found:
            raise ModelError(f"{source} holds two tensors of the name '{name}'")
        found[name] = value
    if not found:
        raise ModelError(f"{source} holds no tensors")
    if sum(value.nbytes for value in found.values()) > MAX_GROWTH * source.stat().st_size:
        raise ModelError(f"{source}: its tensors have more than {MAX_GROWTH} times the bytes of the file")
    return found


def _from_archive(source: Path) -> Any:
    with zipfile.ZipFile(source) as archive:
        packed = [item.filename for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ModelError(f"{source}: '{packed[0]}' is compressed, which torch never does; unpack and save it again")
        inner = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(inner) != 1:
            raise ModelError(f"{source} is not a torch checkpoint: it has {len(inner)} files data.pkl, not one")
        prefix = inner[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
            raise ModelError(f"{source} was written by a machine of another byte order")
        if archive.getinfo(inner[0]).file_size > MAX_PICKLE:
            raise ModelError(f"{source}: its pickle has more than {MAX_PICKLE} bytes")

        def block(key: str, dtype: torch.dtype, count: int) -> bytes:
            return archive.read(f"{prefix}data/{key}")

        return _Restricted(io.BytesIO(archive.read(inner[0])), block).load()


def _from_row(source: Path) -> Any:
    """The format before 1.6: a number that marks it, a version, the machine, the object, the keys of its storages, and these."""
    with source.open("rb") as stream:
        if stream.read(2) != b"\x80\x02":
            raise ModelError(f"{source} is not a torch checkpoint")
        stream.seek(0)
        sizes: dict[str, int] = {}

        def nothing(key: str, dtype: torch.dtype, count: int) -> bytes:
            sizes[key] = count * dtype.itemsize
            return b""

        head = [_Restricted(_Short(stream), nothing).load() for _ in range(3)]
        if head[:2] != [LEGACY_MAGIC, 1001] or not isinstance(head[2], dict) or not head[2].get("little_endian", True):
            raise ModelError(f"{source} is not a torch checkpoint of this machine's byte order")
        start = stream.tell()
        _Survey(_Short(stream), nothing).load()
        length = stream.tell() - start
        blocks: dict[str, bytes] = {}
        for key in map(str, _Restricted(_Short(stream), nothing).load()):
            stream.seek(8, io.SEEK_CUR)  # the number of elements once more
            if not 0 <= sizes[key] <= source.stat().st_size - stream.tell():
                raise ModelError(f"{source} ends before storage {key} does")
            blocks[key] = stream.read(sizes[key])
        stream.seek(start)
        return _Restricted(io.BytesIO(stream.read(length)), lambda key, dtype, count: blocks[key]).load()


class _Short:
    """A stream that ends after `MAX_PICKLE` bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.end = stream, stream.tell() + MAX_PICKLE

    def read(self, count: int) -> bytes:
        return self.stream.read(min(count, max(0, self.end - self.stream.tell())))

    def readline(self) -> bytes:
        return self.stream.readline(max(0, self.end - self.stream.tell()))


def convert_checkpoint(source: Path, out: Path) -> list[str]:
    """Write every tensor of a pickled checkpoint to a safetensors file; returns their names.

    Raises:
        ModelError: the source cannot be read, or `out` does not end in ``.safetensors``.
    """
    from safetensors.torch import save

    if out.suffix != ".safetensors":
        raise ModelError(f"{out}: the output must end in .safetensors")
    state = read_pickled_tensors(source)
    data = save({name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()})
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(out)
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return sorted(state)


class _Walk:
    """Tensors below a node with their names. A module's parameters, buffers and children lie in three tables that add no name."""

    def __init__(self, tree: Any) -> None:
        self.tree, self.left = tree, MAX_NODES

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._below(self.tree, "", 0)

    def _below(self, node: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        self.left -= 1
        if depth > MAX_DEPTH or self.left < 0:
            raise ModelError("the checkpoint is nested too deeply, or refers to itself")
        if isinstance(node, Tensor):
            yield name, node
            return
        if isinstance(node, Inert):
            node = node.state[0] if isinstance(node.state, tuple) and node.state else node.state
            if isinstance(node, dict) and {"_parameters", "_modules"} <= set(node):
                yield from self._below(node["_parameters"], name, depth + 1)
                yield from self._below(_kept(node), name, depth + 1)
                yield from self._below(node["_modules"], name, depth + 1)
                return
        if isinstance(node, dict):
            for key, value in node.items():
                yield from self._below(value, f"{name}.{key}" if name else str(key), depth + 1)
        elif isinstance(node, list | tuple):
            for index, value in enumerate(node):
                yield from self._below(value, f"{name}.{index}" if name else str(index), depth + 1)


def _kept(module: dict[Any, Any]) -> Any:
    """The buffers of a pickled module that belong to its state; the others are whatever it last computed."""
    buffers, passing = module.get("_buffers"), module.get("_non_persistent_buffers_set")
    if not isinstance(buffers, dict) or not isinstance(passing, set):
        return buffers
    return {name: value for name, value in buffers.items() if name not in passing}
