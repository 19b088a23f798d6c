"""Pictures read, decoded and made ready by other processes, a few at a time."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from mmalign.media import MediaError, image_kind
from mmalign.media.cores import available_cores
from mmalign.media.slots import SlotPool
from mmalign.rewards.decoding import LARGE, Loaded, Wanted, load_picture
from mmalign.rewards.inputs import Picture, read_picture
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.staging import DeviceResize, Staged, always_staged, interleaved
from mmalign.types import ImageRef

CHUNK: Final = 4
"""Pictures that travel together: one trip takes a dozen turns to the interpreter's lock, and on many cores each is a wait."""
RESIZED_SLOT: Final = 2 << 20
"""Least bytes of shared memory for the resized pixels of a chunk."""
WHOLE_SLOT: Final = 16 << 20
"""The same where pictures come back whole, to be resized on the encoders' device: a chunk of 1024 x 1024."""
SLOTS_EACH: Final = 2
"""Slots per process: one at work, one to be emptied."""
WORTH: Final = 4096
"""Pictures from which on processes are started without being asked for: threads read so many in ten seconds."""
MOST_PROCESSES: Final = 32
LARGEST_THERE: Final = 4 * LARGE
"""Pixels of a picture that processes decode; larger ones are decoded here, where their memory is counted."""


class ProcessDecoders:
    """Reads, decodes and resizes in other processes. They start with the first picture and end with this process or `close`.

    What comes back is what `load_picture` gives here, bit for bit.

    Args:
        processes: how many.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: SlotPool | None = None
        self._locked: bool | None = None
        """Whether the pages of the slots are locked; None: nobody has asked for it."""
        self._lock = threading.Lock()

    def load(
        self, items: Sequence[Any], wanted: Wanted, stage: DeviceResize | None = None
    ) -> list[tuple[bytes, Loaded] | None]:
        """A chunk of pictures, in order: the digest of each and what `load_picture` makes of it. None where a picture has to be
        decoded here, because there is no room for it. May be called from several threads, which are as many chunks under way.

        Args:
            items: encoded files as `Picture`, or what `named_file` knows as a file to be read. The digest of a file that cannot
                be read is empty.

        Raises:
            DataError: there is not enough shared memory, or a process was killed.
        """
        resized = CHUNK * sum(3 * rule.size**2 * 4 for rule in wanted.rules.values())
        pool = self.start(max(resized, RESIZED_SLOT if stage is None else WHOLE_SLOT), stage)
        staged = stage is not None and len(wanted.decodings()) == 1
        whole = stage.ready(wanted.rules) if stage is not None and staged else ()
        slot = pool.take()
        assert slot is not None  # only a take that can be ended gives None
        try:
            made: list[_Made | None] = pool.run(_fill, slot, tuple(items), wanted, whole, staged)
            view = pool.view(slot)
            found = [None if one is None else (one.digest, one.unpacked(view)) for one in made]
            for places in _runs(made):
                self._stage(places, made, view, found, wanted, stage)
            if stage is not None:
                for one in made:
                    if one is not None and one.size is not None and one.layout:
                        stage.met(one.size, wanted.rules)
            return found
        finally:
            pool.give(slot)

    def _stage(
        self, places: list[int], made: list[_Made | None], view: np.ndarray, found: list[tuple[bytes, Loaded] | None],
        wanted: Wanted, stage: DeviceResize | None,
    ) -> None:  # fmt: skip
        """Resize pictures of one size, which lie one after the other, on the device."""
        group = [one for one in (made[place] for place in places) if one is not None]
        start, shape = group[0].offset, (len(group), *(group[0].whole or (0, 0)), 4)
        stored = view[start : start + int(np.prod(shape))].reshape(shape)
        rules = {key: rule for key, rule in wanted.rules.items() if key in group[0].keys}
        several = None if stage is None else stage.resize(
            stored, rules, [one.digest for one in group], locked=bool(self._locked)
        )
        for row, place in enumerate(places):
            known = found[place]
            if several is None or known is None:
                found[place] = None
                continue
            known[1].pixels.update({key: value[row] for key, value in several[0].items()})
            known[1].pixel_digests.update({key: value[row] for key, value in several[1].items()})

    def close(self) -> None:
        """End the processes; the next picture starts them again."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
            self._pool = None

    def start(self, slot_bytes: int = RESIZED_SLOT, stage: DeviceResize | None = None) -> SlotPool:
        """The running processes, begun now if there are none; what does not fit into a slot is left to the caller of `load`.

        Args:
            stage: what will read the slots.
        """
        with self._lock:
            if self._pool is None:
                self._pool = SlotPool(
                    processes=self.processes, slots=SLOTS_EACH * self.processes, slot_bytes=slot_bytes, begin=_begin,
                    remedy="use fewer decoding processes, or threads alone",
                )  # fmt: skip
                self._locked = None
            if self._locked is None and stage is not None:
                unlock = stage.lock_pages(self._pool.memory)
                self._locked = unlock is not None
                if unlock is not None:
                    self._pool.before_close(unlock)
            return self._pool


def best_processes() -> int:
    """One per core but two, which this process wants for itself: with one per core a GPU got a quarter fewer pictures."""
    return min(MOST_PROCESSES, max(1, available_cores() - 2))


def suitable_processes(pictures: int, device: torch.device) -> int:
    """How many processes are worth their start of some seconds: `best_processes` where a GPU waits for thousands of pictures and
    there is shared memory for them; else 0, and threads decode."""
    memory = Path("/dev/shm")
    if device.type != "cuda" or pictures < WORTH or not memory.is_dir():
        return 0
    found = min(best_processes(), shutil.disk_usage(memory).free // (2 * SLOTS_EACH * WHOLE_SLOT))
    return found if found >= 3 else 0


def named_file(entry: Any) -> str | None:
    """The path of a picture that is given by its file, so that it can be read elsewhere; None for all others."""
    if isinstance(entry, Mapping):
        return str(entry["path"]) if entry.get("bytes") is None and entry.get("path") is not None else None
    if isinstance(entry, ImageRef):
        return entry.path if entry.data is None else None
    return str(entry) if isinstance(entry, str | Path) else None


def _runs(made: Sequence[_Made | None]) -> list[list[int]]:
    """Places of whole pictures, those of one size and for the same rules that lie one after the other in one list."""
    out: list[list[int]] = []
    last: tuple[Any, ...] | None = None
    for place, one in enumerate(made):
        # Crops of the same picture lie behind it: the next one is not its neighbour.
        here = None if one is None or one.whole is None else (one.whole, one.keys, place if one.layout else None)
        if here is not None:
            if here != last:
                out.append([])
            out[-1].append(place)
        last = here
    return out


@dataclass(slots=True, kw_only=True)
class _Made:
    """What a process says about one picture of a chunk."""

    digest: bytes = b""
    flags: tuple[str, ...] = ()
    reason: str | None = None
    message: str | None = None
    whole: tuple[int, int] | None = None
    """(height, width) of the picture, which lies at `offset` as ``[H, W, 4]``."""
    keys: frozenset[str] = frozenset()
    """Rules that are still to be carried out on the whole picture."""
    offset: int = 0
    size: tuple[int, int] | None = None
    """(width, height) of the decoded picture that was asked about."""
    layout: tuple[tuple[str, int, str, tuple[int, ...]], ...] = ()
    """(rule, offset, type, shape) of resized pixels."""
    names: dict[str, bytes] = field(default_factory=dict)

    def unpacked(self, view: np.ndarray) -> Loaded:
        """Copies out of the slot."""
        pixels = {}
        for key, offset, kind, shape in self.layout:
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            pixels[key] = torch.from_numpy(view[offset : offset + size].view(kind).reshape(shape).copy())
        return Loaded(
            pixels=pixels, pixel_digests=self.names, flags=self.flags, reason=self.reason, message=self.message
        )


def _begin() -> None:
    torch.set_num_threads(1)


def _fill(
    memory: np.ndarray, items: Sequence[Any], wanted: Wanted, whole: tuple[tuple[int, int], ...], staged: bool = False
) -> list[_Made | None]:
    """In a process: pictures to pixels, one after the other in the memory of a slot.

    Args:
        whole: sizes whose crops are cut on the device.
        staged: whether there is a device that resizes.
    """
    seen = _Whole(memory, whole, staged)
    out: list[_Made | None] = []
    for item in items:
        seen.begin()
        try:
            picture = item if isinstance(item, Picture) else read_picture(item, wanted.limits)
        except MediaError as error:
            out.append(_Made(reason=error.reason, message=str(error)))
            continue
        offset = seen.used
        if _is_too_large(picture, wanted):
            out.append(None)
            continue
        loaded = load_picture(picture, wanted, seen)  # type: ignore[arg-type]  # asked the same question
        if seen.full:
            out.append(None)
            continue
        made = _Made(
            digest=picture.digest, flags=loaded.flags, reason=loaded.reason, message=loaded.message, whole=seen.taken,
            keys=seen.keys, offset=offset, size=seen.size, names=loaded.pixel_digests,
        )  # fmt: skip
        layout: list[tuple[str, int, str, tuple[int, ...]]] = []
        for key, pixels in loaded.pixels.items():
            values = pixels.numpy()
            layout.append((key, seen.used, str(values.dtype), values.shape))
            if not seen.lay(values):
                break
        else:
            made.layout = tuple(layout)
            out.append(made)
            continue
        out.append(None)
    return out


def _is_too_large(picture: Picture, wanted: Wanted) -> bool:
    """Whether its header says so; what is wrong with it is found when it is decoded."""

    def admit(size: tuple[int, int]) -> None:
        raise _Seen(size[0] * size[1] > LARGEST_THERE)

    if picture.data is None or image_kind(picture.data) is None:
        return False
    try:
        picture.decode(wanted.limits, admit=admit)
    except _Seen as seen:
        return bool(seen.args[0])
    except MediaError:
        pass
    return False


class _Seen(Exception):
    """The header was read, and no more is wanted."""


class _Whole:
    """In a process, in the place of `DeviceResize`: lays pictures that are resized on the device into the slot."""

    def __init__(self, memory: np.ndarray, sizes: tuple[tuple[int, int], ...], staged: bool) -> None:
        self.memory, self.sizes, self.staged, self.used = memory, sizes, staged, 0
        self.begin()

    def begin(self) -> None:
        """The next picture."""
        self.size: tuple[int, int] | None = None
        self.taken: tuple[int, int] | None = None
        self.keys: frozenset[str] = frozenset()
        self.full = False
        """Whether there is no room for a picture that has to be resized on the device."""

    def lay(self, values: np.ndarray) -> bool:
        """Put something behind what is there, if there is room."""
        if self.used + values.nbytes > len(self.memory):
            return False
        self.memory[self.used : self.used + values.nbytes].view(values.dtype).reshape(values.shape)[...] = values
        self.used += values.nbytes
        return True

    def __call__(self, image: Image.Image, rules: Mapping[str, Preprocess], digest: bytes) -> Staged | None:
        self.size = image.size
        always = always_staged(image.size, rules) if self.staged else frozenset()
        crops = {key for key, rule in rules.items() if not rule.is_letterbox} if image.size in self.sizes else set()
        stored = interleaved(image) if always or crops else None
        if stored is None:
            return None
        if not self.lay(stored):
            self.full = bool(always)
            return None
        self.taken, self.keys = (image.height, image.width), always | crops
        return Staged(keys=self.keys, pixels={}, names={})
