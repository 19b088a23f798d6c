"""How good the pictures of a fine-tuned model are: distance of features, agreement with captions, and known judges."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]
NO_TOPIQ = "TOPIQ was not measured: pyiqa is not installed (pip install 'mmalign[topiq]'; it downloads its weights)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Measures of one set of pictures. Per picture where one picture has a value, so that intervals can be drawn."""

    clip: NDArray[np.float64]
    """CLIP score of every picture with its caption."""
    features: NDArray[np.float64]
    """Unit CLIP image features ``[N, D]``, for the distance."""
    judged: NDArray[np.float64] | None = None
    """The embedded world's own judge, in [0, 1]; None outside it."""
    topiq: NDArray[np.float64] | None = None
    """TOPIQ without reference, where pyiqa is installed."""


class Judges:
    """Loads the judges once.

    Args:
        clip: name of a dual-encoder reward.
    """

    def __init__(self, clip: str, device: torch.device) -> None:
        from mmalign import rewards

        self.scorer: Any = rewards.load(clip, device=str(device))
        self.device = device
        self._topiq: Any = None
        self.topiq_absent = None if importlib.util.find_spec("pyiqa") else NO_TOPIQ
        """Why there is no TOPIQ, for people; None while there is one."""

    def measure(self, pictures: Pictures, captions: Sequence[str], *, role: str, embedded: bool) -> Quality:
        """Every measure of some pictures.

        Args:
            embedded: whether captions are of the embedded world, which has judges of its own.
        """
        clip = np.asarray(self.scorer.score(list(pictures), list(captions)), dtype=np.float64)
        judged = judge(pictures, captions, role) if embedded else None
        return Quality(clip=clip, features=self.features(pictures), judged=judged, topiq=self.topiq(pictures))

    @torch.no_grad()
    def features(self, pictures: Pictures) -> NDArray[np.float64]:
        """Unit image features of the CLIP. ``[N, D]``"""
        from mmalign.rewards.preprocess import normalise

        backend = self.scorer.backend
        found = []
        for start in range(0, len(pictures), 32):
            values = torch.from_numpy(pictures[start : start + 32]).permute(0, 3, 1, 2).float() / 255
            pixels = normalise(backend.preprocess.from_tensor(values.to(self.device)), backend.mean, backend.std)
            found.append(backend.encode_images(pixels).double().cpu().numpy())
        return np.concatenate(found)

    def topiq(self, pictures: Pictures) -> NDArray[np.float64] | None:
        """TOPIQ (no reference), higher is better; None where it cannot be had, for the reason that `topiq_absent` holds.

        The released evaluation uses the full-reference form with reference and picture in the wrong order, and a reference
        that shares only the caption; without a picture to be faithful to, the form without reference is the honest one.
        """
        if self.topiq_absent is not None:
            return None
        if self._topiq is None:
            try:
                import pyiqa

                self._topiq = pyiqa.create_metric("topiq_nr", device=self.device)
            except Exception as error:  # a download, most of all: one judge less is no reason to lose hours of fine-tuning
                self.topiq_absent = f"TOPIQ could not be loaded: {type(error).__name__}: {error}"
                return None
        with torch.no_grad():
            values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
            return np.asarray(self._topiq(values.to(self.device)).flatten().double().cpu().numpy())


def frechet_distance(first: NDArray[np.float64], second: NDArray[np.float64], *, shrink: float = 0.1) -> float:
    """Frechet distance of two sets of features as Gaussians (arXiv:1706.08500), with covariances shrunk to their diagonal.

    With fewer pictures than dimensions a plain covariance is singular and the distance strongly biased; shrinkage keeps it
    defined, and equal set sizes keep arms comparable. It is not the Inception FID and compares with no published one.

    Args:
        first, second: ``[N, D]`` and ``[M, D]``.
        shrink: share of the covariance that is replaced by its diagonal.
    """
    means = [values.mean(0) for values in (first, second)]
    spreads = []
    for values in (first, second):
        plain = np.cov(values, rowvar=False)
        spreads.append((1 - shrink) * plain + shrink * np.diag(np.diag(plain)))
    # tr (A B)^(1/2) through the symmetric A^(1/2) B A^(1/2), whose eigenvalues are real
    values, vectors = np.linalg.eigh(spreads[0])
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ spreads[1] @ root), 0, None)).sum()
    return float(np.square(means[0] - means[1]).sum() + np.trace(spreads[0]) + np.trace(spreads[1]) - 2 * cross)


def judge(pictures: Pictures, captions: Sequence[str], role: str) -> NDArray[np.float64]:
    """The embedded world's judges: likeness of portraits (illegal), the oracle's checks of shapes. ``[N]`` in [0, 1]"""
    from mmalign.world.domains import likeness
    from mmalign.world.oracle import oracle_scores

    found = likeness(pictures, captions) if role == "illegal" else oracle_scores(pictures, captions)
    return found.astype(np.float64)


def in_embedded_world(captions: dict[str, list[str]]) -> bool:
    """Whether the judges of the embedded world know these captions."""
    from mmalign.world.domains import EVERYBODY
    from mmalign.world.shapes import parse

    try:
        for caption in captions["innocent"]:
            parse(caption)
    except ValueError:
        return False
    return all(caption.partition(" on a ")[0] in EVERYBODY for caption in captions["illegal"])
