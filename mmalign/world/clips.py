"""Short silent films of coloured shapes: one event after another, drawn at any moment, written to MP4, told in order.

A clip is three to six events of one second each. In an event one kind of object moves, grows, shrinks, turns into another
colour, or appears once to three times; no two events of a clip have the same colour and shape, so that the order in which a
caption names them is well defined. Questions about clips and measures of order: ``clip_questions``.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mmalign.world.captions import COUNT_WORDS, article
from mmalign.world.shapes import BACKGROUNDS, COLOURS, PLURALS, SHAPES, SUPERSAMPLE, draw_shape, rgb

SIDE = 48
"""Width and height of a frame, in pixels."""
NUMBERS = (3, 4, 5, 6)
"""How many events a clip can have; all equally often."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ACTIONS = ("moves", "grows", "shrinks", "turns", "appears")
FRAME_RATE = 8
"""Frames per second of the files that are written."""
STYLES = ("first", "after")
"""*First ... Then ... Finally ...* and *... After that ...*."""
DESCRIBE = ("Describe the video.", "What happens in the video?", "Tell what happens in order.")
_PATH = 11.0
_RADIUS = 8.0
_RADII = (5.5, 11.5)


@dataclass(frozen=True, slots=True)
class Event:
    """What one object does. ``detail``: a direction for *moves*, a colour for *turns*, a count for *appears*, else empty."""

    colour: str
    shape: str
    action: str
    detail: str = ""

    def __post_init__(self) -> None:
        details: dict[str, tuple[str, ...]] = {
            "moves": tuple(DIRECTIONS), "turns": tuple(colour for colour in COLOURS if colour != self.colour),
            "appears": COUNT_WORDS[1:4], "grows": ("",), "shrinks": ("",),
        }  # fmt: skip
        known = self.colour in COLOURS and self.shape in SHAPES and self.action in ACTIONS
        if not known or self.detail not in details[self.action]:
            raise ValueError(f"not an event of this world: {self}")

    @property
    def subject(self) -> str:
        """For example ``red circle``."""
        return f"{self.colour} {self.shape}"

    @property
    def sentence(self) -> str:
        """For example ``a red circle moves left`` or ``two blue stars appear``."""
        if self.action == "appears" and self.detail != "one":
            return f"{self.detail} {self.colour} {PLURALS[self.shape]} appear"
        tail = f" {self.detail}" if self.action in ("moves", "turns") else ""
        return f"{article(self.colour)} {self.subject} {self.action}{tail}"


@dataclass(frozen=True, slots=True)
class Clip:
    """Events in order, and the background."""

    events: tuple[Event, ...]
    background: str

    def __post_init__(self) -> None:
        subjects = [event.subject for event in self.events]
        if len(set(subjects)) != len(subjects) or self.background not in BACKGROUNDS:
            raise ValueError(f"every event needs a subject of its own, and the background a known name: {self}")

    @property
    def seconds(self) -> float:
        return float(len(self.events))

    @property
    def key(self) -> str:
        """One line that says everything, for example ``grey|a red circle moves left|two blue stars appear``."""
        return "|".join([self.background, *(event.sentence for event in self.events)])

    @property
    def is_held_out(self) -> bool:
        """Whether the clip is reserved for evaluation: one in ten, by checksum."""
        return zlib.crc32(self.key.encode()) % 10 == 0


def draw_clip(rng: np.random.Generator, *, held_out: bool = False, numbers: Sequence[int] = NUMBERS) -> Clip:
    """A random clip: every number of events, subject and action equally likely, independent of each other."""
    while True:
        events: list[Event] = []
        number = int(rng.choice(list(numbers)))
        while len(events) < number:
            event = _draw_event(rng)
            if all(event.subject != other.subject for other in events):
                events.append(event)
        clip = Clip(tuple(events), str(rng.choice(tuple(BACKGROUNDS))))
        if clip.is_held_out == held_out:
            return clip


def _draw_event(rng: np.random.Generator) -> Event:
    colour, other = (str(value) for value in rng.choice(COLOURS, 2, replace=False))
    action = str(rng.choice(ACTIONS))
    detail = {
        "moves": str(rng.choice(tuple(DIRECTIONS))), "turns": other, "appears": COUNT_WORDS[int(rng.integers(1, 4))],
    }.get(action, "")  # fmt: skip
    return Event(colour, str(rng.choice(SHAPES)), action, detail)


def moments(clip: Clip, count: int) -> np.ndarray:
    """The middle of each of `count` equal parts of the clip, in seconds: float64 ``[count]``."""
    return (np.arange(count) + 0.5) * clip.seconds / count


def render_frames(clip: Clip, times: Sequence[float] | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The clip at the given moments in seconds: uint8 ``[T, 48, 48, 3]``. Tint, saturation and places come from `rng`.

    Raises:
        ValueError: a moment outside the clip.
    """
    tint = 14 * rng.uniform(-1, 1)
    ground = tuple(
        round(min(255, max(0, BACKGROUNDS[clip.background] + delta))) for delta in (tint, 0, -tint)
    )  # fmt: skip
    saturation = rng.uniform(0.7, 1.0)
    places = [_places(event, rng) for event in clip.events]
    frames = np.empty((len(times), SIDE, SIDE, 3), np.uint8)
    for index, moment in enumerate(times):
        if not 0 <= moment < clip.seconds:
            raise ValueError(f"{moment} s is outside the clip of {clip.seconds} s")
        number = int(moment)
        canvas = Image.new("RGB", (SIDE * SUPERSAMPLE, SIDE * SUPERSAMPLE), ground)
        _draw_event_at(ImageDraw.Draw(canvas), clip.events[number], moment - number, places[number], saturation)
        frame = np.asarray(canvas, np.float32).reshape(SIDE, SUPERSAMPLE, SIDE, SUPERSAMPLE, 3).mean((1, 3))
        frames[index] = np.clip(frame + rng.normal(0, 1.5, frame.shape) + 0.5, 0, 255).astype(np.uint8)
    return frames


def _places(event: Event, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Where the objects of an event are (for a move: at its middle)."""
    middle = (SIDE - 1) / 2
    number = COUNT_WORDS.index(event.detail) if event.action == "appears" else 1
    if number == 1:
        return [(middle + rng.uniform(-3, 3), middle + rng.uniform(-3, 3))]
    turn = rng.uniform(0, 2 * np.pi)
    angles = [turn + 2 * np.pi * index / number for index in range(number)]
    return [(middle + 13 * np.cos(angle), middle + 13 * np.sin(angle)) for angle in angles]


def _draw_event_at(
    draw: ImageDraw.ImageDraw, event: Event, done: float, places: list[tuple[float, float]], saturation: float
) -> None:
    """An event when the share `done` of it, in [0, 1), is over."""
    colour, radius, shift = event.colour, _RADIUS, (0.0, 0.0)
    if event.action == "moves":
        along = _PATH * (2 * done - 1)
        across, down = DIRECTIONS[event.detail]
        shift = (along * across, along * down)
    elif event.action in ("grows", "shrinks"):
        share = done if event.action == "grows" else 1 - done
        radius = _RADII[0] + (_RADII[1] - _RADII[0]) * share
    elif event.action == "turns" and done >= 0.5:
        colour = event.detail
    for x, y in places:
        draw_shape(
            draw, event.shape, SUPERSAMPLE * (x + shift[0]), SUPERSAMPLE * (y + shift[1]), SUPERSAMPLE * radius,
            rgb(colour, saturation), 0.0,
        )  # fmt: skip


def tell(events: Sequence[Event], style: str) -> str:
    """The events in the order given.

    Raises:
        ValueError: unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; one of {', '.join(STYLES)}")
    sentences = []
    for index, event in enumerate(events):
        if style == "after":
            start = "After that " if index else ""
        else:
            start = "First " if index == 0 else "Finally " if index == len(events) - 1 else "Then "
        text = start + event.sentence
        sentences.append(text[0].upper() + text[1:] + ".")
    return " ".join(sentences)


_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_ONE = re.compile(
    rf"(?P<article>an?) (?P<colour>{_COLOUR}) (?P<shape>{_SHAPE}) (?:(?P<plain>grows|shrinks|appears)"
    rf"|moves (?P<direction>{'|'.join(DIRECTIONS)})|turns (?P<other>{_COLOUR}))"
)
_SEVERAL = re.compile(
    rf"(?P<count>two|three) (?P<colour>{_COLOUR}) (?P<plural>{'|'.join(PLURALS.values())}) appear"
)
_SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
_START = re.compile(r"^(?:first|then|finally|after that) ")


@dataclass(frozen=True, slots=True)
class ClipReading:
    """Events in the order a caption names them, and the sentences that were not read."""

    events: tuple[Event, ...]
    unread: tuple[str, ...]


def read_clip_caption(text: str) -> ClipReading:
    """Read a caption of a clip. Case and surplus blanks do not matter; nothing is guessed from other sentences."""
    events: list[Event] = []
    unread: list[str] = []
    *sentences, tail = [" ".join(part.lower().split()) for part in text.split(".")]
    for sentence in sentences:
        event = read_event(_START.sub("", sentence, count=1))
        if event is None:
            unread.append(sentence)
        else:
            events.append(event)
    if tail:
        unread.append(tail)
    return ClipReading(tuple(events), tuple(unread))


def read_event(sentence: str) -> Event | None:
    """The event that a sentence without its full stop and first word says, or None if it is none of this world's."""
    several = _SEVERAL.fullmatch(sentence)
    if several is not None:
        return Event(several["colour"], _SINGULAR[several["plural"]], "appears", several["count"])
    one = _ONE.fullmatch(sentence)
    if one is None or one["article"] != article(one["colour"]) or one["other"] == one["colour"]:
        return None
    if one["plain"] is not None:
        return Event(one["colour"], one["shape"], one["plain"], "one" if one["plain"] == "appears" else "")
    if one["direction"] is not None:
        return Event(one["colour"], one["shape"], "moves", one["direction"])
    return Event(one["colour"], one["shape"], "turns", one["other"])


def parse_clip_key(key: str) -> Clip:
    """The clip that a key describes.

    Raises:
        ValueError: it is not a clip's key.
    """
    background, *sentences = key.split("|")
    events = [read_event(sentence) for sentence in sentences]
    if None in events or not events:
        raise ValueError(f"not the key of a clip: {key!r}")
    return Clip(tuple(event for event in events if event is not None), background)


def encode_mp4(frames: np.ndarray, *, frame_rate: int = FRAME_RATE) -> bytes:
    """Real MP4 bytes (H.264, 4:2:0) of uint8 ``[T, H, W, 3]``; H and W even.

    Encoded on one thread without a time stamp in the header, so the same frames give the same bytes with one version of the
    encoder. Needs PyAV (the ``video`` extra).
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(frame_rate), options={"crf": "14", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def render_mp4(clip: Clip, rng: np.random.Generator) -> bytes:
    """The whole clip as a film at ``FRAME_RATE``."""
    count = round(clip.seconds * FRAME_RATE)
    return encode_mp4(render_frames(clip, moments(clip, count), rng))


def write_mp4(clip: Clip, path: Path, rng: np.random.Generator) -> Path:
    """``render_mp4`` into a file; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render_mp4(clip, rng))
    return path
