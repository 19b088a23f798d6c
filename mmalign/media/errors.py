"""Why a picture was refused: one reason from a fixed list, so that reports can count them."""

from __future__ import annotations

from typing import Final

from mmalign.errors import DataError

IMAGE_REASONS: Final = (
    "undecodable_image",
    "truncated_image",
    "empty_image",
    "missing_image",
    "unsupported_format",
    "too_large",
    "dicom_photometric",
    "dicom_frames",
    "dicom_missing_tag",
)
VIDEO_REASONS: Final = ("unreadable_video", "no_video_stream", "frame_timeout")


class MediaError(DataError):
    """A media file that cannot be used.

    Args:
        reason: one of `IMAGE_REASONS` or `VIDEO_REASONS`.
        detail: what exactly was found, for a person.
        source: the file, or table and row, that held it.
    """

    def __init__(self, *, reason: str, detail: str, source: str = "") -> None:
        if reason not in (*IMAGE_REASONS, *VIDEO_REASONS):
            raise ValueError(f"'{reason}' is not a media reason")
        self.reason = reason
        self.detail = detail
        self.source = source
        super().__init__(f"{source}: {reason}: {detail}" if source else f"{reason}: {detail}")
