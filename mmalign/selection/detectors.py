"""Who says where shots begin: PySceneDetect's detectors, or the network TransNetV2 with weights by path.

A detector is made once for a run and begun for every film; it is fed frame by frame, so that no second library opens the file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from mmalign.errors import MissingExtraError
from mmalign.selection.settings import ShotsConfig


class ShotDetector(ABC):
    """Beginnings of shots, film by film."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What its answers depend on beyond the settings in the file, e.g. a hash of weights; '' where nothing."""

    @abstractmethod
    def begin(self) -> None:
        """A new film follows."""

    @abstractmethod
    def see(self, number: int, frame: np.ndarray) -> None:
        """The next frame, counted from 0: uint8 ``[H, W, 3]``, red first."""

    @abstractmethod
    def cuts(self, total: int) -> list[int]:
        """Numbers of the frames, of `total` that were seen, at which shots begin; the first frame need not be named."""


class SceneDetect(ShotDetector):
    """One of PySceneDetect's detectors.

    Raises:
        MissingExtraError: the library is not installed.
    """

    def __init__(self, settings: ShotsConfig) -> None:
        try:
            from scenedetect import FrameTimecode, detectors
        except ImportError as error:
            raise MissingExtraError("scenedetect", "scenedetect", "detecting shots") from error
        kinds = {
            "content": detectors.ContentDetector, "adaptive": detectors.AdaptiveDetector, "hash": detectors.HashDetector,
            "histogram": detectors.HistogramDetector, "threshold": detectors.ThresholdDetector,
        }  # fmt: skip
        self._kind, self._code = kinds[settings.detector], FrameTimecode
        self._options: dict[str, Any] = {} if settings.detector == "threshold" else {"min_scene_len": settings.min_frames}
        if settings.threshold is not None:
            self._options["adaptive_threshold" if settings.detector == "adaptive" else "threshold"] = settings.threshold
        self.begin()

    @property
    def identity(self) -> str:
        return ""

    def begin(self) -> None:
        self._made: Any = self._kind(**self._options)
        self._found: list[int] = []

    def see(self, number: int, frame: np.ndarray) -> None:
        self._found += map(_number, self._made.process_frame(self._at(number), np.ascontiguousarray(frame[..., ::-1])))

    def cuts(self, total: int) -> list[int]:
        return [*self._found, *map(_number, self._made.post_process(self._at(max(total - 1, 0))))]

    def _at(self, number: int) -> Any:
        # Detectors count frames; the rate only turns counts into their own time, which is not read here.
        return self._code(number, 25.0)


class TransNet(ShotDetector):
    """TransNetV2 (arXiv:2008.04838). A shot begins behind a frame, or a run of frames, that the network marks.

    The frames of a gradual transition stay with the shot before it. The release gives the network windows of 2,000 frames that
    overlap by 400; here it has the 100 frames of its training, the middle 50 of which are answered, as in its authors' script.

    Raises:
        ModelError: no such weights, no safetensors, or weights of something else.
    """

    def __init__(self, settings: ShotsConfig, device: str) -> None:
        import torch

        from mmalign.rewards.files import fingerprint
        from mmalign.selection.transnet import TransitionFinder, load_transnet

        assert settings.weights is not None  # `ShotsConfig` looked
        network = load_transnet(settings.weights)
        self._identity = f"transnetv2|{fingerprint(network.state_dict())}"
        where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        network.to(where)
        self._limit = 0.5 if settings.threshold is None else settings.threshold
        output = 0 if settings.head == "one_hot" else 1

        @torch.no_grad()
        def ask(frames: torch.Tensor) -> torch.Tensor:
            return network(frames[None].to(where))[output][0].sigmoid().cpu()

        self._new = lambda: TransitionFinder(ask)
        self.begin()

    @property
    def identity(self) -> str:
        return self._identity

    def begin(self) -> None:
        self._finder = self._new()

    def see(self, number: int, frame: np.ndarray) -> None:
        self._finder.see(frame)

    def cuts(self, total: int) -> list[int]:
        return behind(self._finder.finish() > self._limit)


def behind(marked: np.ndarray) -> list[int]:
    """Numbers of the frames that follow a marked frame and are not marked. bool ``[N]``"""
    return (np.flatnonzero(marked[:-1] & ~marked[1:]) + 1).tolist()


def load_detector(settings: ShotsConfig, device: str = "cpu") -> ShotDetector:
    """The detector that the settings name.

    Args:
        device: auto, cpu or cuda; PySceneDetect's run on the CPU.

    Raises:
        MissingExtraError: PySceneDetect is not installed.
        ModelError: weights that cannot be loaded.
    """
    return TransNet(settings, device) if settings.detector == "transnetv2" else SceneDetect(settings)


def _number(cut: Any) -> int:
    return int(cut.frame_num)
