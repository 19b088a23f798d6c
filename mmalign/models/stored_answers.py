"""What frozen parts say about answers and pictures, computed once: reference log-probabilities and vision features.

Both belong to one starting model and one processor; who fills them sees to that by the name of their folder.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmalign.branches import BranchBatch, VisionFeatures
from mmalign.errors import DataError


class StoredAnswers:
    """A precomputed reference: log-probabilities of every answer of a table, by the record's id.

    Not a function of a network: `of` gives what is stored, and asking it like another reference is an error.
    """

    def __init__(self, sums: Mapping[str, Sequence[float]] | None = None) -> None:
        self.sums: dict[str, tuple[float, ...]] = {name: tuple(values) for name, values in (sums or {}).items()}

    def __call__(self, evaluate: Callable[[nn.Module], Tensor]) -> Tensor:
        raise TypeError("a precomputed reference holds scores and no network to ask")

    def of(self, batch: BranchBatch) -> Tensor:
        """Summed log-probabilities in the batch's flat order, on its device. ``[R]`` float32.

        Raises:
            DataError: a record whose answers were not stored.
        """
        found: list[float] = []
        for name, count in zip(batch.ids, batch.counts, strict=True):
            values = self.sums.get(name)
            if values is None or len(values) != count:
                raise DataError(f"the reference's log-probabilities of row '{name}' are not stored; fill the cache again")
            found.extend(values)
        return torch.tensor(found, dtype=torch.float32, device=batch.record.device)


class VisionStore:
    """Projected features of pictures and clips on disk, one file per distinct unit, named by its digest.

    Args:
        folder: of one model and processor; made when first written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        """`encoded`: pictures and clips that the tower ran on; `read`: answered from disk."""

    def path(self, kind: str, digest: str) -> Path:
        """Where the features of a unit are."""
        return self.folder / kind / digest[:2] / f"{digest}.safetensors"

    def has(self, kind: str, digest: str) -> bool:
        return self.path(kind, digest).exists()

    def lacks(self, batch: BranchBatch) -> bool:
        """Whether any unit of the batch is not stored."""
        media = batch.media
        return not all(self.has("image", item) for item in media.image_digests) or not all(
            self.has("video", item) for item in media.video_digests
        )

    def put(self, batch: BranchBatch, features: VisionFeatures) -> None:
        """Store the units of a batch that are not there yet."""
        media = batch.media
        for kind, digests, values, deep in (
            ("image", media.image_digests, features.image, features.image_deep),
            ("video", media.video_digests, features.video, features.video_deep),
        ):
            for number, digest in enumerate(digests):
                if not self.has(kind, digest):
                    self.counts["encoded"] += 1
                    layers = deep[number] if deep else ()
                    self._write(self.path(kind, digest), [values[number], *layers])

    def of(self, batch: BranchBatch) -> VisionFeatures:
        """The stored features of a batch, on its device, in the dtype they were stored in.

        Raises:
            DataError: a unit is not stored, or its file cannot be read.
        """
        device, media = batch.record.device, batch.media
        image = [self._read("image", digest, device) for digest in media.image_digests]
        video = [self._read("video", digest, device) for digest in media.video_digests]

        def deep(units: list[list[Tensor]]) -> tuple[tuple[Tensor, ...], ...]:
            return tuple(tuple(layers[1:]) for layers in units) if any(len(layers) > 1 for layers in units) else ()

        return VisionFeatures(
            image=tuple(layers[0] for layers in image), video=tuple(layers[0] for layers in video),
            image_deep=deep(image), video_deep=deep(video),
        )  # fmt: skip

    def _write(self, path: Path, layers: list[Tensor]) -> None:
        from safetensors.torch import save_file

        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({str(n): value.detach().cpu().contiguous().clone() for n, value in enumerate(layers)}, temporary)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"data.cache: cannot write {path}: {error}; free space or name another folder") from error

    def _read(self, kind: str, digest: str, device: torch.device) -> list[Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path(kind, digest)
        self.counts["read"] += 1
        try:
            stored = load_file(path, device=str(device))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: stored vision features cannot be read: {error}; remove the file and start again") from error
        return [stored[str(number)] for number in range(len(stored))]
