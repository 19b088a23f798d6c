"""One shard of a cache: a safetensors file whose rows are read straight from the memory map.

A shard's name is the SHA-256 of its content, so that it verifies itself. It holds the tensors of n entries stacked
along the first axis, and the 16-byte digests of their keys. Where entries differ in size (the frames of clips), a tensor
is their values end to end, and a second one, of the same name with `SHAPE` behind it, holds their shapes. Not for
deciding what is cached where.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from mmalign.data.files import MappedFile, atomic_file
from mmalign.errors import DataError

KEYS: Final = "__keys__"
SHAPE: Final = "#shape"
DIGEST_BYTES: Final = 16
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER: Final = 100 << 20


def key_digest(key: str) -> bytes:
    """What stands for a key inside a shard. A key that is ``#`` and 32 hexadecimal digits is a digest already: those of pictures
    are made from the pictures' hashes, for whole tables at once."""
    if key.startswith("#"):
        return bytes.fromhex(key[1:])
    return hashlib.blake2b(key.encode(), digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where one tensor lies in a shard, and what one entry of it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of one entry; -1 for every axis where entries differ in size."""
    start: int
    """Byte offset in the file."""
    row_bytes: int
    """Of one entry; 0 where entries differ in size."""
    shapes: np.ndarray | None = None
    """Shape of each entry, [n, axes] int64, where entries differ in size."""

    @property
    def kind(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """What has to be the same in all shards of a cache."""
        return self.dtype, self.shape

    def places(self) -> np.ndarray:
        """Where each entry begins and, at last, where the last one ends: byte offsets in the file, [n + 1] int64."""
        if self.shapes is None:
            raise ValueError("entries of one size are found by their number")
        sizes = self.shapes.prod(axis=1) * self.dtype.itemsize
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64) + self.start


class Shard:
    """A shard opened for reading; nothing but the header is read until rows are asked for.

    Raises:
        DataError: the file is not such a shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._mapped = MappedFile(path)
            self._map = np.frombuffer(self._mapped.buffer, dtype=np.uint8)
            self.layouts, keys = _parse(self._map)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a readable cache shard: {error}") from error
        count = keys.row_bytes // DIGEST_BYTES
        self.digests = np.array(self._map[keys.start : keys.start + keys.row_bytes]).reshape(count, DIGEST_BYTES)
        """[n, 16] uint8."""
        self._places = {name: layout.places() for name, layout in self.layouts.items() if layout.shapes is not None}

    def __len__(self) -> int:
        return len(self.digests)

    def is_like(self, other: Shard) -> bool:
        """True when entries of both shards have the same names, dtypes and shapes."""
        return self.kinds == other.kinds

    @property
    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of one entry, -1 for axes that differ."""
        return {name: layout.kind for name, layout in self.layouts.items()}

    def entry(self, number: int) -> dict[str, Tensor]:
        """Copies of all tensors of one entry, in the shape it was stored with."""
        found = {}
        for name, layout in self.layouts.items():
            if layout.shapes is None:
                start, shape = layout.start + number * layout.row_bytes, layout.shape
                stop = start + layout.row_bytes
            else:
                start, stop = (int(place) for place in self._places[name][number : number + 2])
                shape = tuple(int(side) for side in layout.shapes[number])
            found[name] = torch.empty(shape, dtype=layout.dtype)
            if stop > start:
                data = torch.from_numpy(np.array(self._map[start:stop]))
                found[name] = data.view(layout.dtype).reshape(shape)
            self._mapped.touched(stop - start)
        return found

    def rows(self, name: str, numbers: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Copy entries `numbers` of a tensor into rows `places` of `out`, uint8 [*, row_bytes]."""
        layout = self.layouts[name]
        stop = layout.start + len(self) * layout.row_bytes
        out[places] = self._map[layout.start : stop].reshape(len(self), layout.row_bytes)[numbers]
        self._mapped.touched(len(numbers) * layout.row_bytes)


def kinds_of(tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What `Shard.kinds` will say of a shard of these tensors.

    Raises:
        DataError: a list mixes types or numbers of axes.
    """
    found = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            found[name] = (value.dtype, tuple(value.shape[1:]))
            continue
        kinds = {(item.dtype, (-1,) * item.ndim) for item in value}
        if len(kinds) != 1:
            raise DataError(f"entries of '{name}' must have one type and number of axes, got {sorted(map(str, kinds))}")
        found[name] = kinds.pop()
    return found


def _parse(data: np.ndarray) -> tuple[dict[str, Layout], Layout]:
    if len(data) < 8:
        raise ValueError("too short")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise ValueError("header longer than the file")
    header = json.loads(data[8 : 8 + length].tobytes())
    base = 8 + length
    count = int(header[KEYS]["shape"][0])
    layouts: dict[str, Layout] = {}
    sizes: dict[str, int] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (int(value) for value in entry["data_offsets"])
        shape = tuple(int(value) for value in entry["shape"])
        dtype = _DTYPES[entry["dtype"]]
        ragged = name + SHAPE in header
        if (not ragged and shape[:1] != (count,)) or not 0 <= begin <= end <= len(data) - base:
            raise ValueError(f"tensor '{name}' does not lie within the file")
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"tensor '{name}' has the wrong size")
        row_bytes = (end - begin) // count if count and not ragged else 0
        layouts[name] = Layout(dtype=dtype, shape=shape[1:], start=base + begin, row_bytes=row_bytes)
        sizes[name] = end - begin
    for name in [name for name in layouts if name.endswith(SHAPE)]:
        _join(layouts, name.removesuffix(SHAPE), data, sizes)
    keys = layouts.pop(KEYS)
    whole = Layout(dtype=keys.dtype, shape=(count, DIGEST_BYTES), start=keys.start, row_bytes=keys.row_bytes * count)
    if keys.shape != (DIGEST_BYTES,) or keys.dtype is not torch.uint8:
        raise ValueError("keys have the wrong shape")
    return layouts, whole


def _join(layouts: dict[str, Layout], name: str, data: np.ndarray, sizes: Mapping[str, int]) -> None:
    """Give a tensor of entries that differ in size the shapes that are stored beside it."""
    beside, values = layouts.pop(name + SHAPE), layouts[name]
    if beside.dtype is not torch.int64 or len(beside.shape) != 1 or values.shape:
        raise ValueError(f"the shapes of tensor '{name}' are not [n, axes] integers")
    stored = data[beside.start : beside.start + sizes[name + SHAPE]]
    shapes = np.array(stored).view(np.int64).reshape(-1, beside.shape[0])
    layout = Layout(dtype=values.dtype, shape=(-1,) * beside.shape[0], start=values.start, row_bytes=0, shapes=shapes)
    if (shapes < 0).any() or int(layout.places()[-1]) != values.start + sizes[name]:
        raise ValueError(f"tensor '{name}' has the wrong size")
    layouts[name] = layout


def write_shard(folder: Path, keys: Sequence[str], tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> Path:
    """Write one shard atomically; it appears complete under its content's name, or not at all.

    Args:
        keys: n keys.
        tensors: [n, ...] each, or n tensors of one dtype and number of axes where entries differ in size; on the CPU.
    """
    from safetensors.torch import save

    digests = np.frombuffer(b"".join(key_digest(key) for key in keys), dtype=np.uint8).reshape(len(keys), DIGEST_BYTES)
    plain: dict[str, Tensor] = {KEYS: torch.from_numpy(digests.copy())}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            plain[name] = value.contiguous()
        else:
            plain[name] = torch.cat([item.reshape(-1) for item in value])
            plain[name + SHAPE] = torch.tensor([list(item.shape) for item in value], dtype=torch.int64)
    payload = save(plain)
    path = folder / f"shard-{hashlib.sha256(payload).hexdigest()}.safetensors"
    with atomic_file(path) as handle:
        handle.write(payload)
    return path
