"""Rows to pixels, ahead of the encoders: files are read, identified, decoded and resized on threads, each distinct one once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mmalign.media import PLAIN, Colours, Limits, MediaError
from mmalign.rewards.decoding import Loaded, ProcessDecoders, Wanted, load_picture
from mmalign.rewards.inputs import Picture, read_picture
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.staging import DeviceResize

MOST_WORKERS = 32


def default_workers() -> int:
    """Threads that read, decode and resize: one per core that this process may use, at least 4 and at most `MOST_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(4, cores))


@dataclass(slots=True)
class Window:
    """Some rows, read."""

    start: int
    digests: list[bytes]
    pictures: dict[bytes, Loaded]

    @property
    def decoded(self) -> int:
        """Pictures that could be decoded."""
        return sum(picture.reason is None for picture in self.pictures.values())


class Reader:
    """Reads windows of rows.

    Args:
        rules: preprocessing by key; every picture is made ready for all of them.
        keep_image: keep the decoded picture too, for rewards that read no pixels.
        limits: what is too large to decode.
        stage: resizes on the encoders' device; None: on the threads.
        colours: what becomes of transparency and rotation tags.
        decoders: processes that decode encoded files; None: the threads do.
    """

    def __init__(
        self,
        rules: Mapping[str, Preprocess],
        *,
        keep_image: bool,
        limits: Limits,
        stage: DeviceResize | None = None,
        colours: Colours = PLAIN,
        decoders: ProcessDecoders | None = None,
    ) -> None:
        self.wanted = Wanted(rules=dict(rules), keep_image=keep_image, limits=limits, colours=colours)
        self.stage, self.decoders = stage, decoders

    @property
    def colours(self) -> Colours:
        return self.wanted.colours

    def read(self, images: Sequence[Any], start: int, pool: ThreadPoolExecutor) -> Window:
        """The rows from number `start` on, on the threads of `pool`."""
        # The same object may stand in many rows; a lazily opened picture must not be loaded by two threads at once.
        objects = {id(entry): entry for entry in images}
        known = dict(zip(objects, pool.map(self._identify, objects.values()), strict=True))
        identified = [known[id(entry)] for entry in images]
        digests = [
            picture.digest if isinstance(picture, Picture) else f"failed row {start + row}".encode()
            for row, picture in enumerate(identified)
        ]
        first = dict(reversed(list(zip(digests, identified, strict=True))))
        window = Window(
            start=start, digests=digests, pictures=dict(zip(first, pool.map(self._load, first.values()), strict=True))
        )
        if self.stage is not None:
            self.stage.wait()
        return window

    def _identify(self, entry: Any) -> Picture | MediaError:
        try:
            return read_picture(entry, self.wanted.limits, clip=self.wanted.colours.clip)
        except MediaError as error:
            return error

    def _load(self, picture: Picture | MediaError) -> Loaded:
        if isinstance(picture, MediaError):
            return Loaded(reason=picture.reason, message=str(picture))
        found = None if self.decoders is None else self.decoders.load(picture, self.wanted, self.stage)
        return load_picture(picture, self.wanted, self.stage) if found is None else found
