"""Every frame of a film looked at once: where shots end, how sharp each frame is, and which grey levels it spans.

The frames are ours (display matrix and presentation times applied), whoever detects the shots (``detectors``). Not for deciding
about films: ``rules``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.media import all_frames
from mmalign.selection.detectors import ShotDetector

if TYPE_CHECKING:
    from mmalign.types import ImageRef

_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was seen of one film, per frame."""

    times: np.ndarray  # [N] float64 seconds
    sharpness: np.ndarray  # [N] float32: mean |Laplacian| of the blurred grey frame
    low: np.ndarray  # [N] float32: darkest grey level
    high: np.ndarray  # [N] float32: brightest
    cuts: tuple[int, ...]
    """Numbers of the frames that begin a shot; the first is 0."""

    @property
    def duration(self) -> float:
        """Seconds until the end of the last frame, which is taken to be shown as long as frames are on average."""
        steps = np.diff(self.times)
        return float(self.times[-1] + (steps.mean() if len(steps) else 0.0))

    def record(self) -> dict[str, Any]:
        """Plain data, for the file of facts."""
        return {
            "times": [round(float(value), 6) for value in self.times],
            "sharpness": [round(float(value), 4) for value in self.sharpness],
            "low": [round(float(value), 2) for value in self.low], "high": [round(float(value), 2) for value in self.high],
            "cuts": list(self.cuts),
        }  # fmt: skip

    @classmethod
    def of(cls, record: dict[str, Any]) -> Survey:
        """From plain data."""
        return cls(
            times=np.asarray(record["times"]), cuts=tuple(record["cuts"]),
            **{name: np.asarray(record[name], dtype=np.float32) for name in ("sharpness", "low", "high")},
        )  # fmt: skip


def survey(ref: ImageRef, detector: ShotDetector, *, max_side: int, timeout_seconds: float) -> Survey:
    """Look at a film.

    Args:
        max_side: longer side to which frames are reduced before anything looks at them.

    Raises:
        MediaError: it cannot be decoded.
    """
    times, sharp, low, high = [], [], [], []
    detector.begin()
    for number, (time, frame) in enumerate(
        all_frames(ref, max_side=max_side, timeout_seconds=timeout_seconds)
    ):
        grey = frame.astype(np.float32) @ _GREY
        times.append(time)
        sharp.append(sharpness(grey))
        low.append(float(grey.min()))
        high.append(float(grey.max()))
        detector.see(number, frame)
    cuts = {0, *detector.cuts(len(times))}
    return Survey(
        times=np.asarray(times), sharpness=np.asarray(sharp, dtype=np.float32), low=np.asarray(low, dtype=np.float32),
        high=np.asarray(high, dtype=np.float32), cuts=tuple(sorted(cut for cut in cuts if 0 <= cut < len(times))),
    )  # fmt: skip


def sharpness(grey: np.ndarray) -> float:
    """Mean |Laplacian| of a grey picture ``[H, W]`` after a 3 x 3 Gaussian blur, edges mirrored."""
    padded = np.pad(grey.astype(np.float32), 1, mode="reflect" if min(grey.shape) > 1 else "edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    blurred = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    around = np.pad(blurred, 1, mode="reflect" if min(grey.shape) > 1 else "edge")
    laplacian = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:] - 4 * blurred
    return float(np.abs(laplacian).mean())
