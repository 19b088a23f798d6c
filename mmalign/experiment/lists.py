"""Ranked lists made ready for a run: the counterpart of ``inputs`` for methods that train on K pictures a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmalign.data.autoworkers import fixed_workers
from mmalign.errors import ConfigError, DataError
from mmalign.experiment import streams
from mmalign.experiment.inputs import ENCODE_BATCH, Inputs, cache_root, refuse_missing_scores, resolution
from mmalign.experiment.settings import ExperimentConfig
from mmalign.models.diffusion.base import DiffusionFamily


def prepare_lists(config: ExperimentConfig, family: DiffusionFamily, accelerator: Any) -> Inputs:
    """Check every candidate of a ranked table, fill the caches, and build the loader of this process.

    The main process does the work first; the others then find the caches filled.

    Raises:
        ConfigError: random crops together with a cache.
        DataError: a table that is no ranked one or was not checked as asked, too many bad rows, or a cache that cannot be
            written.
    """
    from mmalign import data
    from mmalign.data.augment import Augmentation
    from mmalign.data.ranked_facts import usable_lists
    from mmalign.data.ranked_loader import RankedLoader

    main, settings = accelerator.is_main_process, config.data
    table = data.open_ranked(settings.manifest, progress=main)
    refuse_missing_scores(config, table.rewards)
    side = resolution(config, family)
    augmentation = Augmentation(
        resolution=(side, side), flip=settings.flip, crop=settings.crop, drop_caption=settings.drop_caption
    )
    if not main:
        accelerator.wait_for_everyone()
    policy = data.CheckPolicy(ties=settings.ties, max_bad_fraction=settings.max_bad_fraction)
    index = usable_lists(
        table, check=settings.check, policy=policy, cached=settings.cache != "off",
        workers=fixed_workers(settings.workers) or None, progress=main,
    )  # fmt: skip
    latents = text = None
    if settings.cache != "off":
        latents, text, index = _fill(config, family, table, index, augmentation, progress=main)
    if main:
        accelerator.wait_for_everyone()
    loader = RankedLoader(
        table, index, augmentation=augmentation, batch_size=config.optim.batch_size, accumulate=config.optim.accumulate,
        world_size=accelerator.num_processes, rank=accelerator.process_index, seed=config.run.seed, shuffle=settings.shuffle,
        latents=latents, text=text, workers=settings.workers, prefetch=settings.prefetch,
        max_runtime_failures=streams.masked_limit(accelerator.num_processes),
    )  # fmt: skip
    return Inputs(
        loader=loader, table_fingerprint=loader.order.fingerprint, processes=accelerator.num_processes, checked=index.checked
    )


def _fill(
    config: ExperimentConfig, family: DiffusionFamily, table: Any, index: Any, augmentation: Any, *, progress: bool
) -> tuple[Any, Any, Any]:
    """Encode what is not in the caches yet. The caches are those of pairs: a picture or prompt of both is encoded once."""
    from mmalign import data
    from mmalign.data.ranked_index import fill_list_latents, fill_list_text

    if config.data.crop == "random":
        raise ConfigError("data.crop: 'random' draws a new crop each time, which a cache cannot hold; set data.cache=off")
    root = cache_root(config)
    fields = {
        **family.fingerprint("vae"),
        **data.geometry_fields(resolution=augmentation.resolution, crop=config.data.crop, crop_variants=0),
    }
    latents = data.Cache.open_or_create(root, "vae", fields)
    text = data.Cache.open_or_create(root, "text", family.fingerprint("text"))

    def encode_images(pixels: Tensor) -> Mapping[str, Tensor]:
        moments = family.encode_images(pixels)
        return {"mean": moments.mean.cpu(), "std": moments.std.cpu()}

    def encode_text(prompts: list[str]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {name: value.cpu() for name, value in family.encode_prompts(prompts).items()}

    prompts = {str(table.value(int(row), "prompt")) for row in index.rows} | ({""} if config.data.drop_caption else set())
    try:
        index = fill_list_latents(
            latents, table, index, augmentation, encode=encode_images, batch_size=ENCODE_BATCH, progress=progress
        )
        fill_list_text(text, prompts, encode=encode_text, batch_size=ENCODE_BATCH, progress=progress)
    except OSError as error:
        raise DataError(
            f"data.cache: cannot write to {root} ({error}); free space, name another folder with data.cache=..., or use "
            f"data.cache=off"
        ) from error
    return latents, text, index
