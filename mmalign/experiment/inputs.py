"""Data made ready for a run: which rows are usable, what is cached, and the loader of this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.data.autoworkers import fixed_workers
from mmalign.data.remote import is_remote, mirror_folder
from mmalign.errors import ConfigError, DataError
from mmalign.experiment import streams
from mmalign.experiment.long_prompts import judge_prompts
from mmalign.experiment.settings import ExperimentConfig, LoraConfig
from mmalign.experiment.users import People, UserStream, prepare_people, users_of
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.models.reference import Reference
from mmalign.trainers import METHODS
from mmalign.types import StepContext

if TYPE_CHECKING:
    from mmalign.data import Cache, CheckResult, PairLoader, PairTable
    from mmalign.data.bucketed import BucketedLoader
    from mmalign.data.ranked_loader import RankedLoader

ENCODE_BATCH = 16


@dataclass(kw_only=True)
class Inputs:
    """The stream of a run and what was left out of it."""

    loader: PairLoader | RankedLoader | BucketedLoader | UserStream
    table_fingerprint: str
    """Fingerprint of the order: same value, same batches."""
    processes: int
    checked: CheckResult
    cache_problems: Sequence[Any] = ()
    people: People | None = None
    """The users of a personalised run."""
    masked: Sequence[Any] | None = None
    """Rows masked by all processes, before a resume too, once the run is over (``rowcounts``)."""

    @property
    def quarantined(self) -> int:
        """Rows refused for a defect, before and during the run."""
        return self.checked.quarantined + len(self.cache_problems) + len(self._masked)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows left out, by reason."""
        return {**self.checked.counts, **(self.people.dropped if self.people is not None else {})}

    @property
    def _masked(self) -> Sequence[Any]:
        return self.loader.masked if self.masked is None else self.masked

    def write_quarantine(self, path: Path) -> None:
        """``quarantine.jsonl``: everything refused, with file, row, id and reason."""
        import json

        self.checked.write_quarantine(path)
        with path.open("a") as handle:
            for problem in self.cache_problems:
                handle.write(json.dumps(_plain(problem)) + "\n")
            for row in self._masked:
                handle.write(json.dumps(_plain(row)) + "\n")


def _plain(value: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(value)


def prepare_inputs(
    config: ExperimentConfig, family: DiffusionFamily, accelerator: Any, start: Reference | None = None
) -> Inputs:
    """Check the table, fill the caches, and build the loader of this process.

    The main process does the work first; the others then find it done.

    Args:
        start: asks the starting weights; needed where the reference is precomputed.
    """
    from mmalign import data

    if METHODS.get(config.method_name).batches == "lists":
        from mmalign.experiment.lists import prepare_lists

        return prepare_lists(config, family, accelerator)
    if METHODS.get(config.method_name).batches == "domains":
        from mmalign.experiment.domains import prepare_domains

        return prepare_domains(config, family, accelerator)
    main = accelerator.is_main_process
    table = streams.open_pairs(config.data)
    refuse_missing_scores(config, table.rewards)
    side = resolution(config, family)
    if not main:
        accelerator.wait_for_everyone()
    checked = streams.usable(config.data, table, check_policy(config), progress=main)
    checked, cut = judge_prompts(config.data, family, table, checked)
    if cut is not None and main:
        accelerator.print(f"data: {cut}")
    people = prepare_people(config, table, checked, root=cache_root(config), main=main)
    rows = checked.rows if people is None else people.rows
    optim, wanted = config.optim, config.data
    settings: dict[str, Any] = {
        "batch_size": optim.batch_size, "accumulate": optim.accumulate, "world_size": accelerator.num_processes,
        "rank": accelerator.process_index, "seed": config.run.seed, "flip": wanted.flip, "drop_caption": wanted.drop_caption,
        "workers": wanted.workers, "prefetch": wanted.prefetch,
        "max_runtime_failures": streams.masked_limit(accelerator.num_processes),
    }  # fmt: skip
    if config.data.buckets:
        shaped, lost = streams.bucketed(
            table, checked, side=side, multiple=family.image_multiple, shuffle=config.data.shuffle, settings=settings,
            fill=None if config.data.cache == "off" else lambda some, size: fill_pairs(
                config, family, table, some, checked.media, size, progress=main),
        )  # fmt: skip
        if main:
            accelerator.wait_for_everyone()
        return Inputs(
            loader=shaped, table_fingerprint=shaped.order.fingerprint, processes=accelerator.num_processes,
            checked=checked, cache_problems=lost,
        )  # fmt: skip
    problems: list[Any] = []
    latents = text = None
    media = checked.media
    if config.data.cache != "off":
        if media is None:
            media = data.index_media(table, rows, fixed_workers(config.data.workers))
        latents, text, rows, problems = fill_pairs(config, family, table, rows, media, (side, side), progress=main)
    size = config.optim.batch_size * config.optim.accumulate * accelerator.num_processes
    order = streams.mixture(config.data, table, rows, seed=config.run.seed, global_batch=size)
    order = order or streams.capped(config.data, table, rows, seed=config.run.seed, global_batch=size)
    if wanted.max_per_prompt is not None and order is not None and main:
        accelerator.print(f"data: an epoch has {order.length} of {len(rows)} rows, at most {wanted.max_per_prompt} of a prompt")
    if people is not None:
        people.rows = rows
        order = order or people.order(seed=config.run.seed, global_batch=size)
    loader = data.PairLoader(
        table, rows, shuffle=config.data.shuffle, resolution=(side, side), crop=config.data.crop, media=media, latents=latents,
        text=text, draws=config.draws, order=order, decode=wanted.decode, **settings,
    )  # fmt: skip
    if start is not None:
        loader.with_reference(_fill_references(config, family, loader, start, accelerator.device, progress=main))
    if main:
        accelerator.wait_for_everyone()
    return Inputs(
        loader=loader if people is None else UserStream(loader, people), table_fingerprint=loader.order.fingerprint,
        processes=accelerator.num_processes, checked=checked, cache_problems=problems, people=people,
    )  # fmt: skip


def refuse_missing_scores(config: ExperimentConfig, held: Sequence[str]) -> None:
    """Raises ConfigError if the method needs scores that the table does not hold."""
    if problem := METHODS.get(config.method_name).lacking_scores(config.method, held):
        raise ConfigError(problem)


def resolution(config: ExperimentConfig, family: DiffusionFamily) -> int:
    """Side of the training pictures in pixels.

    Raises:
        ConfigError: not a multiple of what the VAE and the network divide by.
    """
    own = family.latent_shape[1] * family.latent_factor
    side = config.data.resolution or own
    if side % family.image_multiple:
        raise ConfigError(f"data.resolution: {side} is not a multiple of {family.image_multiple}, as the model needs it")
    return side


def cache_root(config: ExperimentConfig) -> Path:
    """Where caches lie: beside the table, unless a folder is named."""
    if config.data.cache != "auto":
        return Path(config.data.cache)
    manifest = mirror_folder(config.data.manifest) if is_remote(config.data.manifest) else Path(config.data.manifest)
    return (manifest if manifest.is_dir() else manifest.parent) / "cache"


def check_policy(config: ExperimentConfig) -> Any:
    """What is done about bad rows, as the experiment says."""
    from mmalign.data import CheckPolicy

    # Two people with one verdict on one pair are two votes, not a row that came twice.
    duplicates = "drop" if users_of(config) is None else "keep"
    return CheckPolicy(ties=config.data.ties, max_bad_fraction=config.data.max_bad_fraction, duplicates=duplicates)


def fill_pairs(
    config: ExperimentConfig, family: DiffusionFamily, table: PairTable, rows: Any, media: Any, size: tuple[int, int], *,
    progress: bool, shard: tuple[int, int] = (0, 1), kinds: Sequence[str] = ("vae", "text"),
) -> tuple[Cache, Cache, Any, list[Any]]:  # fmt: skip
    """Encode what is not in the caches yet: latents, texts, or both; returns the caches, the rows left, and what was refused."""
    from mmalign import data

    if config.data.crop == "random":
        raise ConfigError("data.crop: 'random' draws a new crop each time, which a cache cannot hold; set data.cache=off")
    root = cache_root(config)
    geometry = data.geometry_fields(resolution=size, crop=config.data.crop, crop_variants=0)
    fields = {**family.fingerprint("vae"), **geometry}
    latents = data.Cache.open_or_create(root, "vae", fields)
    text = data.Cache.open_or_create(root, "text", family.fingerprint("text"))

    def encode_images(pixels: Tensor) -> Mapping[str, Tensor]:
        moments = family.encode_images(pixels)
        return {"mean": moments.mean.cpu(), "std": moments.std.cpu()}

    def encode_text(prompts: list[str]) -> Mapping[str, Tensor]:
        return {name: value.cpu() for name, value in family.encode_prompts(prompts).items()}

    outcome = data.FillOutcome(rows=rows, problems=(), stored=0)
    try:
        if "vae" in kinds:
            outcome = data.fill_latents(
                latents, table, rows, media, resolution=size, flip=config.data.flip, crop=config.data.crop,
                crop_variants=0, encode=encode_images, batch_size=ENCODE_BATCH, workers=fixed_workers(config.data.workers),
                progress=progress,
                shard=shard,
            )  # fmt: skip
        if "text" in kinds:
            data.fill_text(
                text, table, outcome.rows, encode=encode_text, batch_size=ENCODE_BATCH,
                drop_caption=config.data.drop_caption, progress=progress, shard=shard,
            )  # fmt: skip
    except OSError as error:
        raise DataError(
            f"data.cache: cannot write to {root} ({error}); free space, name another folder with data.cache=..., or use "
            f"data.cache=off"
        ) from error
    return latents, text, outcome.rows, list(outcome.problems)


def _fill_references(
    config: ExperimentConfig, family: DiffusionFamily, loader: PairLoader, start: Reference, device: torch.device, *,
    progress: bool,
) -> Cache:  # fmt: skip
    """Ask the starting weights for every stored draw that was not asked yet."""
    from mmalign import data
    from mmalign.models.diffusion.pairs import stored_scores

    root, settings = cache_root(config), config.data
    fields = {
        "network": family.fingerprint("network"), "vae": family.fingerprint("vae"), "text": family.fingerprint("text"),
        "geometry": data.geometry_fields(resolution=loader.augmentation.resolution, crop=settings.crop, crop_variants=0),
        "seed": config.run.seed, "flip": settings.flip, "drop_caption": settings.drop_caption, "draws_version": 1,
        # Two roundings of one network: through adapters switched off, and through weights that want gradients.
        "tuning": "lora" if isinstance(config.tuning, LoraConfig) else "full",
    }  # fmt: skip
    cache = data.Cache.open_or_create(root, "referr", fields)
    ctx = StepContext(step=0, seed=config.run.seed, device=device)
    try:
        data.fill_references(
            cache, loader, lambda batch: stored_scores(family, start, batch, ctx).cpu(), progress=progress
        )
    except OSError as error:
        raise DataError(
            f"data.cache: cannot write to {root} ({error}); free space, name another folder with data.cache=..., or use "
            f"another reference"
        ) from error
    return cache
