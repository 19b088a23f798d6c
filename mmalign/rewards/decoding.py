"""One picture, decoded and made ready for the encoders; how much memory pictures may take while that is done."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from PIL import Image
from torch import Tensor

from mmalign.media import PLAIN, Colours, Limits, MediaError
from mmalign.rewards.inputs import SCORED, Picture
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.staging import DeviceResize

LARGE: Final = 8_000_000
"""Pixels from which on a picture must find room before it is decoded, and is decoded again where it is wanted itself."""
AT_ONCE: Final = 160_000_000
"""Pixels of large pictures that may be decoded at the same time, 4 bytes each and some copies: a file of 100 kB can hold a
hundred million, and there may be a folder of them."""


class Room:
    """Counts pixels of large pictures that are being decoded, over all threads."""

    def __init__(self, pixels: int) -> None:
        self.pixels, self.used = pixels, 0
        self._changed = threading.Condition()

    @contextmanager
    def __call__(self) -> Iterator[Callable[[tuple[int, int]], None]]:
        """Gives what `decode_image` asks for admission; the room is free again when the block ends."""
        held = 0

        def admit(size: tuple[int, int]) -> None:
            nonlocal held
            wanted = size[0] * size[1]
            if wanted < LARGE:
                return
            with self._changed:
                self._changed.wait_for(lambda: self.used == 0 or self.used + wanted <= self.pixels)
                self.used += wanted
                held += wanted

        try:
            yield admit
        finally:
            if held:
                with self._changed:
                    self.used -= held
                    self._changed.notify_all()


ROOM: Final = Room(AT_ONCE)


@dataclass(slots=True)
class Loaded:
    """One distinct picture of a window."""

    pixels: dict[str, Tensor] = field(default_factory=dict)  # preprocessing key -> [3, s, s]
    pixel_digests: dict[str, bytes] = field(default_factory=dict)
    """Of `pixels`: two rules that give the same pixels share one encoding."""
    image: Image.Image | None = None
    """The picture itself, if it was to be kept and is not large."""
    again: Picture | None = None
    """A large one that was to be kept: what to decode when it is needed."""
    flags: tuple[str, ...] = ()
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to become of every picture."""

    rules: Mapping[str, Preprocess]
    """By key."""
    keep_image: bool = False
    limits: Limits = SCORED
    colours: Colours = PLAIN

    def decodings(self) -> list[dict[str, Preprocess]]:
        """Rules that read the same decoding: all that read the whole picture, and drafts by what they want of it. That of the
        whole picture comes first, and is there if the picture is to be kept."""
        found: dict[object, dict[str, Preprocess]] = {None: {}} if self.keep_image or not self.rules else {}
        for key, rule in sorted(self.rules.items(), key=lambda item: item[1].draft):
            found.setdefault((rule.is_letterbox, rule.size) if rule.draft else None, {})[key] = rule
        return list(found.values())


def load_picture(picture: Picture, wanted: Wanted, stage: DeviceResize | None = None) -> Loaded:
    """Decode a picture and make it ready for all rules; what is wrong with it where that cannot be."""
    found, decodings = Loaded(), wanted.decodings()
    if len(decodings) > 1:
        stage = None  # as processes do, which hand over one whole picture at most
    for rules in decodings:
        with ROOM() as admit:
            try:
                image = _load_one(picture, wanted, rules, stage, found, admit)
            except MediaError as error:
                return Loaded(reason=error.reason, message=str(error))
            if wanted.keep_image and not any(rule.draft for rule in rules.values()):
                large = picture.image is None and image.width * image.height >= LARGE
                found.image, found.again = (None, picture) if large else (image, None)
    return found


def whole_picture(picture: Picture, wanted: Wanted) -> Image.Image:
    """The decoded picture, of one that could be decoded before."""
    return picture.decode(wanted.limits, colours=wanted.colours).image


def _load_one(
    picture: Picture, wanted: Wanted, rules: dict[str, Preprocess], stage: DeviceResize | None, found: Loaded,
    admit: Callable[[tuple[int, int]], None],
) -> Image.Image:  # fmt: skip
    """One decoding, and what the rules make of it."""
    draft = next((rule.least for rule in rules.values() if rule.draft), None)
    needs_stored = any(rule.needs_stored for rule in rules.values())
    decoded = picture.decode(wanted.limits, keep_stored=needs_stored, colours=wanted.colours, draft=draft, admit=admit)
    staged = stage(decoded.image, rules, picture.digest) if stage is not None and decoded.stored is None else None
    if staged is not None:
        found.pixels.update(staged.pixels)
        found.pixel_digests.update(staged.names)
    for key in [key for key in rules if staged is None or key not in staged.keys]:
        found.pixels[key] = rules[key].from_image(decoded.image, decoded.stored, wanted.colours)
        found.pixel_digests[key] = _digest(found.pixels[key])
    found.flags = found.flags or decoded.flags
    return decoded.image


def _digest(pixels: Tensor) -> bytes:
    return hashlib.blake2b(pixels.numpy().data, digest_size=16).digest()
