"""Batches of pairs for a training loop of one's own: `mmalign.data.loader`.

The caches, order, masking and exact resume of `mmalign train` without its trainer. A batch holds latents as training would
draw them at that step (or pixels, without a model), text-encoder outputs, labels and weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmalign import rng
from mmalign.data import index_media
from mmalign.data.autoworkers import Workers
from mmalign.data.files import canonical_hash
from mmalign.data.mediaindex import MediaIndex
from mmalign.data.opened import Pairs, open_pairs
from mmalign.data.order import Shuffle
from mmalign.data.pair_loader import PairLoader
from mmalign.data.transfer import on_device
from mmalign.errors import ConfigError, DataError
from mmalign.experiment import streams
from mmalign.experiment.caching import TableJob
from mmalign.experiment.inputs import fill_pairs, resolution
from mmalign.experiment.settings import ExperimentConfig
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.types import Geometry, PairBatch

STATE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B pairs. The first of two is always the chosen one; `label` says how sure that is."""

    row_id: tuple[str, ...]
    prompt: tuple[str, ...]
    """As the model should read them: a dropped caption is ''."""
    latents: Tensor | None
    """[B, 2, C, h, w] float32, in the space that the denoiser works in; None without a model."""
    pixels: Tensor | None
    """[B, 2, 3, H, W] float32 in [-1, 1]; None where latents are cached."""
    text: Mapping[str, Tensor] | None
    """Text-encoder outputs by name, [B, ...] each; None without a model."""
    label: Tensor  # [B] float32 in [0.5, 1]: probability that the chosen picture is preferred
    weight: Tensor  # [B] float32; 0 for a row that could not be read now
    scores: Mapping[str, Tensor]  # reward -> [B, 2] float32
    chosen: Geometry
    rejected: Geometry
    step: int

    def __len__(self) -> int:
        return len(self.row_id)


class Batches:
    """An endless line of batches, one epoch a pass; see `loader`."""

    def __init__(self, pairs: Pairs, loader: Any, *, family: DiffusionFamily | None, device: torch.device, checked: Any,
                 lost: list[Any], settings: Mapping[str, Any]) -> None:  # fmt: skip
        self.pairs, self.loader, self.family, self.device = pairs, loader, family, device
        self.step = 0
        """The batch that comes next."""
        self._checked, self._lost = checked, lost
        self._settings = dict(settings)

    def __len__(self) -> int:
        """Batches of one pass."""
        return max(1, len(self.loader.order.rows) // self.loader.global_batch)

    def __iter__(self) -> Iterator[Batch]:
        """One epoch from where the last pass, or a loaded state, stopped.

        Raises:
            DataError: too many rows had to be masked.
        """
        stream = self.loader.micro_batches(self.step)
        try:
            for _ in range(len(self)):
                step, _, batch = next(stream)
                # Counted when it is handed out: what was read ahead and never seen is read again after a resume.
                self.step = step + 1
                yield self._batch(step, batch)
        finally:
            stream.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the line is: plain values, for a file or for ``accelerate``'s save_state."""
        return {
            "version": STATE_VERSION, **self._settings, "epoch": self.loader.epoch(self.step), "next_global_batch": self.step,
            "samples_seen": self.step * self.loader.global_batch, "masked": len(self.loader.masked),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where a state was taken. Nothing is replayed.

        Raises:
            DataError: the table, the rows used, the seed, the global batch or the shapes differ; says which.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(f"a loader state of version {state.get('version')}; this is version {STATE_VERSION}")
        changed = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._settings.items() if state.get(name) != value
        ]  # fmt: skip
        if changed:
            raise DataError(f"this loader gives other batches than the one whose state this is: {'; '.join(changed)}")
        self.step = int(state["next_global_batch"])

    def report(self) -> dict[str, Any]:
        """Rows used, left out by reason, refused while caches were filled, and masked at run time."""
        reasons: dict[str, int] = {}
        for problem in self._lost:
            reasons[problem.reason] = reasons.get(problem.reason, 0) + 1
        return {
            "rows": self._checked.total, "used": len(self.loader.order.rows), "reasons": {**self._checked.counts, **reasons},
            "quarantined": self._checked.quarantined,
            "masked": [{"id": row.id, "step": row.step, "reason": row.reason} for row in self.loader.masked],
        }  # fmt: skip

    def _batch(self, step: int, batch: PairBatch) -> Batch:
        text = None if batch.text is None else {name: value.to(self.device) for name, value in batch.text.items()}
        latents = pixels = None
        if batch.chosen.pixels is not None and batch.rejected.pixels is not None:
            pixels = torch.stack([batch.chosen.pixels, batch.rejected.pixels], dim=1).to(self.device)
        if self.family is not None:
            latents = self._latents(step, batch)
            text = text or {name: value.to(self.device) for name, value in self.family.encode_prompts(batch.prompts).items()}
        scores = dict(batch.scores)
        slots = self.loader.order.micro_batch(
            step, 0, batch_size=self.loader.batch_size, world_size=self.loader.world_size, rank=self.loader.rank
        )
        rows = np.array([slot.row for slot in slots])
        scores |= {name: torch.from_numpy(values[rows]).float() for name, values in self.pairs.scores.items()}
        return Batch(
            row_id=batch.ids, prompt=batch.prompts, latents=latents, pixels=pixels, text=text,
            label=batch.p_chosen.to(self.device), weight=batch.weight.to(self.device), scores=scores,
            chosen=batch.chosen.geometry, rejected=batch.rejected.geometry, step=step,
        )  # fmt: skip

    def _latents(self, step: int, batch: PairBatch) -> Tensor:
        """Samples of the posteriors with the noise that `mmalign train` would draw at this step. [B, 2, C, h, w]"""
        assert self.family is not None
        made = []
        for name, side in (("chosen", batch.chosen), ("rejected", batch.rejected)):
            moments = side.moments
            if moments is None:
                assert side.pixels is not None
                moments = self.family.encode_images(side.pixels.to(self.family.device))
            moments = moments.to(self.device)
            seed = int(self._settings["seed"])
            noise = rng.normal(batch.ids, moments.mean.shape[1:], seed=seed, purpose=f"vae/{name}", step=step)
            made.append(self.family.latents(moments, noise.to(self.device)))
        return torch.stack(made, dim=1)


def loader(
    pairs: Pairs | str | Path, *, model: Any = None, batch_size: int, buckets: Literal["auto"] | bool | None = None,
    seed: int = 0, device: str | torch.device = "cpu", resolution: int | None = None, shuffle: Shuffle = True, flip: bool = False,
    drop_caption: float = 0.0, cache: str = "auto", workers: Workers = 2, prefetch: int = 3, world_size: int = 1, rank: int = 0,
) -> Batches:  # fmt: skip
    """Batches of pairs, cached where a model is given, resumable at any of them.

    Args:
        pairs: what `mmalign.data.open` gave, or what it takes.
        model: a diffusers folder or hub id, a loaded family, or a pipeline that was loaded from a folder (its frozen encoders
            are read from there again); None gives pixels.
        batch_size: pairs of one batch of this process.
        buckets: ``auto`` or True for several shapes of about the same area, one shape a batch.
        resolution: side in pixels; by default the model's own. Needed without a model.
        cache: as ``data.cache``: ``auto``, ``off`` or a folder.
        world_size, rank: number of processes, and of this one. The order is the same for any number of them.

    Raises:
        ConfigError: no resolution, or settings that do not go together.
        DataError: too many bad rows, or fewer than a batch.
    """
    from mmalign.experiment.assembly import load_family

    pairs = pairs if isinstance(pairs, Pairs) else open_pairs(pairs)
    where = torch.device(device)
    family = model if isinstance(model, DiffusionFamily) else None
    if family is None and model is not None:
        path = str(model) if isinstance(model, str | Path) else str(getattr(model.config, "_name_or_path", "") or "")
        if not path:
            raise ConfigError("model: a pipeline that does not say which folder it came from; give the folder")
        kind = "cuda" if where.type == "cuda" else "cpu"
        family = load_family(TableJob(table=str(pairs.table.path), kinds=("vae",), model=path, device=kind).experiment(), where)
    checked = pairs.usable()
    common: dict[str, Any] = {
        "batch_size": batch_size, "world_size": world_size, "rank": rank, "seed": seed, "flip": flip,
        "drop_caption": drop_caption, "workers": workers, "prefetch": prefetch,
    }  # fmt: skip
    made, lost, side = _made(pairs, family, checked, common, buckets=bool(buckets), side=resolution, shuffle=shuffle, cache=cache)
    settings = {
        "table": pairs.table.fingerprint, "rows": canonical_hash(made.order.rows.tolist()), "seed": seed,
        "global_batch": made.global_batch, "resolution": side, "buckets": bool(buckets), "shuffle": shuffle, "flip": flip,
        "drop_caption": drop_caption,
    }  # fmt: skip
    return Batches(
        pairs, on_device(made, where), family=family, device=where, checked=checked, lost=lost, settings=settings
    )


def _made(
    pairs: Pairs, family: DiffusionFamily | None, checked: Any, common: dict[str, Any], *, buckets: bool, side: int | None,
    shuffle: Shuffle, cache: str,
) -> tuple[Any, list[Any], int]:  # fmt: skip
    """The loader beneath, what it left out, and the side in pixels."""
    if family is None and side is None:
        raise ConfigError("resolution: without a model, say how large the pictures are to be")
    fill = None
    if family is not None:
        config = replace_data(
            TableJob(
                table=str(pairs.table.path), kinds=("vae",), model=str(family.config.path), family=family.config.name,
                resolution=side, flip=bool(common["flip"]), root=None if cache in ("auto", "off") else cache,
            ).experiment(), drop_caption=common["drop_caption"], workers=common["workers"],
        )  # fmt: skip
        side = resolution(config, family)
        if cache != "off":
            fill = partial(_fill, config, family, pairs, checked.media or index_media(pairs.table, checked.rows))
    assert side is not None
    if buckets:
        shaped, lost = streams.bucketed(
            pairs.table, checked, side=side, multiple=family.image_multiple if family else 8, fill=fill, shuffle=shuffle,
            settings={**common, "accumulate": 1},
        )  # fmt: skip
        return shaped, lost, side
    latents, text, rows, problems = fill(checked.rows, (side, side)) if fill else (None, None, checked.rows, [])
    media = fill.args[3] if fill else checked.media
    made = PairLoader(
        pairs.table, rows, shuffle=shuffle, resolution=(side, side), media=media, latents=latents, text=text, **common
    )
    return made, problems, side


def _fill(
    config: ExperimentConfig, family: DiffusionFamily, pairs: Pairs, media: MediaIndex, rows: Any, size: tuple[int, int]
) -> Any:
    return fill_pairs(config, family, pairs.table, rows, media, size, progress=False)


def replace_data(config: Any, **settings: Any) -> Any:
    """An experiment with other settings of its data."""
    return config.model_copy(update={"data": config.data.model_copy(update=settings)})


__all__ = ["Batch", "Batches", "loader"]
