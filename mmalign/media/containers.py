"""What kind of video file some bytes are, and whether the file ends before its content does.

The container is named to the decoder explicitly: a playlist or a text file that happens to parse must never make it open
other files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A file format that holds video: FFmpeg's name for its reader, and its media type."""

    demuxer: str
    mime: str


MP4: Final = Container(demuxer="mov", mime="video/mp4")
MATROSKA: Final = Container(demuxer="matroska", mime="video/x-matroska")
AVI: Final = Container(demuxer="avi", mime="video/x-msvideo")
_PREFIXES: Final = (
    (b"\x1aE\xdf\xa3", MATROSKA),
    (b"FLV\x01", Container(demuxer="flv", mime="video/x-flv")),
    (b"OggS", Container(demuxer="ogg", mime="video/ogg")),
    (b"\x00\x00\x01\xba", Container(demuxer="mpeg", mime="video/mpeg")),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Container(demuxer="asf", mime="video/x-ms-asf")),
    (b"GIF87a", Container(demuxer="gif", mime="image/gif")),
    (b"GIF89a", Container(demuxer="gif", mime="image/gif")),
)
_TRANSPORT: Final = Container(demuxer="mpegts", mime="video/mp2t")
_OLD_QUICKTIME: Final = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_BOXES: Final = (*_OLD_QUICKTIME, b"ftyp", b"moof", b"mfra", b"sidx", b"styp", b"meta", b"udta", b"uuid", b"emsg", b"prft")
"""Boxes that stand at the top of a file."""
_SOUND: Final = (b"ID3", b"fLaC", b"\xff\xfb", b"\xff\xf3", b"\xff\xf1", b"\xff\xf9")


def container_of(head: bytes) -> Container | None:
    """The container that the first bytes (189 or more) announce; None when it is none we read."""
    for prefix, container in _PREFIXES:
        if head.startswith(prefix):
            return container
    if head[4:8] == b"ftyp" or head[4:8] in _OLD_QUICKTIME:
        return MP4
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return AVI
    if head[:1] == b"\x47" and head[188:189] in (b"\x47", b""):
        return _TRANSPORT
    return None


def is_sound(head: bytes) -> bool:
    """True for the first bytes of a plain sound file."""
    return head.startswith(_SOUND) or (head[:4] == b"RIFF" and head[8:12] == b"WAVE")


def cut_short(handle: IO[bytes], size: int, container: Container) -> str | None:
    """What is missing at the end of a file, from its own statement of lengths; None when it is whole or says nothing.

    Args:
        handle: positioned anywhere.
        size: of the file, in bytes.
    """
    if container is MP4:
        return _cut_boxes(handle, size)
    if container is AVI:
        handle.seek(4)
        said = int.from_bytes(handle.read(4), "little") + 8
        return f"{size} of {said} bytes are there" if said > size and said != 8 else None
    return _cut_matroska(handle, size) if container is MATROSKA else None


def _cut_boxes(handle: IO[bytes], size: int) -> str | None:
    """Walk the top-level boxes of an ISO base media file (ISO/IEC 14496-12, 4.2)."""
    at, has_index = 0, False
    while at + 8 <= size:
        handle.seek(at)
        head = handle.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        has_index |= kind == b"moov"
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:
            length = size - at
        if length < 8 or (at + length > size and kind not in _BOXES):
            break  # no box: something that was appended to the file
        at += length
    if at > size:
        return f"{size} of {at} bytes are there"
    return None if has_index else "its index ('moov') is not there"


def _cut_matroska(handle: IO[bytes], size: int) -> str | None:
    """Whether the segment of a Matroska or WebM file goes beyond its end (RFC 8794 sizes)."""
    handle.seek(0)
    head = handle.read(64)
    at = 4
    length, width = _variable(head, at)
    if length is None:
        return None
    at += width + length
    handle.seek(at)
    segment = handle.read(16)
    if segment[:4] != b"\x18\x53\x80\x67":
        return None
    length, width = _variable(segment, 4)
    if length is None:
        return None  # a live recording: its length was never written
    said = at + 4 + width + length
    return f"{size} of {said} bytes are there" if said > size else None


def _variable(data: bytes, at: int) -> tuple[int | None, int]:
    """An EBML variable-length size and its width in bytes; None for the reserved unknown size."""
    if at >= len(data) or data[at] == 0:
        return None, 1
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), width
