"""Rows to pixels, ahead of the encoders: files are read, identified, decoded and resized on threads, each distinct one once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mmalign.media import PLAIN, Colours, Limits, MediaError
from mmalign.media.cores import available_cores
from mmalign.rewards.decoders import CHUNK, ProcessDecoders, named_file
from mmalign.rewards.decoding import Loaded, Wanted, load_picture
from mmalign.rewards.inputs import Picture, read_picture
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.staging import DeviceResize

MOST_WORKERS = 32


def default_workers() -> int:
    """Threads that read, decode and resize: one per core that this process may use, at least 4 and at most `MOST_WORKERS`."""
    return min(MOST_WORKERS, max(4, available_cores()))


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
        decoders: processes that read and decode files; None: the threads do. Files of several names and one content are then
            decoded once for each name (and encoded once).
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
        files = self._read_files(objects, pool)
        others = {key: entry for key, entry in objects.items() if key not in files}
        known: dict[int, Picture | MediaError | tuple[bytes, Loaded]] = {
            **files, **dict(zip(others, pool.map(self._identify, others.values()), strict=True))
        }  # fmt: skip
        identified = [known[id(entry)] for entry in images]
        digests = [_digest(one) or f"failed row {start + row}".encode() for row, one in enumerate(identified)]
        first = dict(reversed(list(zip(digests, identified, strict=True))))
        pictures = {digest: one[1] for digest, one in first.items() if isinstance(one, tuple)}
        rest = {digest: one for digest, one in first.items() if not isinstance(one, tuple)}
        pictures.update(zip(rest, self._load_all(list(rest.values()), pool), strict=True))
        if self.stage is not None:
            self.stage.wait()
        return Window(start=start, digests=digests, pictures=pictures)

    def _read_files(self, objects: Mapping[int, Any], pool: ThreadPoolExecutor) -> dict[int, tuple[bytes, Loaded]]:
        """Pictures that name files, read and decoded by processes in one go, each file once. Not in the result: other pictures,
        those that processes have no room for, and files that cannot be read, of which each row has its own to say."""
        if self.decoders is None or self.wanted.keep_image:
            return {}
        paths = {key: path for key, entry in objects.items() if (path := named_file(entry)) is not None}
        distinct = {path: objects[key] for key, path in reversed(paths.items())}
        found = dict(zip(distinct, self._in_chunks(list(distinct.values()), pool), strict=True))
        return {key: made for key, path in paths.items() if (made := found[path]) is not None and made[0]}

    def _load_all(self, pictures: Sequence[Picture | MediaError], pool: ThreadPoolExecutor) -> list[Loaded]:
        found: list[Loaded | None] = [None] * len(pictures)
        if self.decoders is not None and not self.wanted.keep_image:
            places = [place for place, one in enumerate(pictures) if isinstance(one, Picture) and one.data is not None]
            for place, made in zip(places, self._in_chunks([pictures[place] for place in places], pool), strict=True):
                found[place] = None if made is None else made[1]
        left = [place for place, made in enumerate(found) if made is None]
        for place, one in zip(left, pool.map(self._load, [pictures[place] for place in left]), strict=True):
            found[place] = one
        return [one for one in found if one is not None]

    def _in_chunks(self, items: Sequence[Any], pool: ThreadPoolExecutor) -> list[tuple[bytes, Loaded] | None]:
        decoders = self.decoders
        assert decoders is not None
        chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
        return [one for part in pool.map(lambda chunk: decoders.load(chunk, self.wanted, self.stage), chunks) for one in part]

    def _identify(self, entry: Any) -> Picture | MediaError:
        try:
            return read_picture(entry, self.wanted.limits, clip=self.wanted.colours.clip)
        except MediaError as error:
            return error

    def _load(self, picture: Picture | MediaError) -> Loaded:
        if isinstance(picture, MediaError):
            return Loaded(reason=picture.reason, message=str(picture))
        return load_picture(picture, self.wanted, self.stage)


def _digest(one: Picture | MediaError | tuple[bytes, Loaded]) -> bytes:
    """Equal for equal pictures; empty where there is none."""
    if isinstance(one, MediaError):
        return b""
    return one.digest if isinstance(one, Picture) else one[0]
