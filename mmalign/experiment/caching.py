"""`mmalign data cache`: what a run would compute once, computed ahead, by one process or by many.

Two ways to say what: an experiment file, whose every cache is filled exactly as its run will ask for it, or a table with
the kinds that are wanted and the model that makes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmalign.config import Resolved, decode
from mmalign.data.autoworkers import fixed_workers
from mmalign.data.engines import Engine, each_part
from mmalign.errors import ConfigError
from mmalign.experiment import streams
from mmalign.experiment.inputs import cache_root, check_policy, fill_pairs, prepare_inputs, resolution
from mmalign.experiment.settings import ExperimentConfig, load_experiment
from mmalign.trainers import METHODS

if TYPE_CHECKING:
    from mmalign.data import PairTable, RankedTable

ENCODED = ("vae", "text")
KINDS = (*ENCODED, "clip", "scores", "frames")
"""What can be asked for of a table. ``vision``, ``reflogp`` and ``referr`` belong to an experiment, whose file says all."""


def fill_caches(
    path: str | Path, overrides: Sequence[str] = (), *, shard: tuple[int, int] = (0, 1), engine: Engine = "local",
    workers: int | None = None, gpus: float | None = None,
) -> str:  # fmt: skip
    """Fill the caches of an experiment without training; returns what was stored.

    Args:
        shard: (i, n): this process encodes its share of what is missing; others, which share the folder, encode theirs.
        engine: ``processes`` or ``ray`` have shares made by other processes; then this one looks whether all is there.
        workers, gpus: as of ``mmalign.data.engines.each_part``.
    """
    if engine != "local":
        count = workers or 2
        shares = partial(share_maker, str(path), tuple(overrides), count)
        for _ in each_part(shares, range(count), engine=engine, workers=count, gpus=gpus, title="Caching"):
            pass
    return fill_experiment(load_experiment(path, overrides).config, shard=shard)


def share_maker(path: str, overrides: tuple[str, ...], count: int) -> Callable[[int], int]:
    """Reads the experiment where this is called, and gives what fills one of `count` shares there."""
    config = load_experiment(path, overrides).config
    return lambda number: len(fill_experiment(config, shard=(number, count)))


def fill_experiment(
    config: ExperimentConfig, *, shard: tuple[int, int] = (0, 1), kinds: Sequence[str] = ENCODED
) -> str:
    """As `fill_caches`, of settings that are read already; `kinds` may leave out latents or text."""
    from mmalign import data
    from mmalign.experiment.assembly import load_family

    device = torch.device("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    whole = _only_whole(config)
    if whole and shard[1] > 1:
        raise ConfigError(f"{whole}: these caches are filled by one process; run it without shards")
    if whole:
        return _as_the_run_does(config, device)
    family = load_family(config, device)
    table = streams.open_pairs(config.data)
    checked = streams.usable(config.data, table, check_policy(config), progress=True)
    media = checked.media or data.index_media(table, checked.rows, fixed_workers(config.data.workers))
    _, _, rows, problems = fill_pairs(
        config, family, table, checked.rows, media, (resolution(config, family),) * 2, progress=True, shard=shard, kinds=kinds
    )
    if shard[1] > 1:
        return f"share {shard[0]} of {shard[1]} is cached in {cache_root(config)}, {len(problems)} refused"
    stored = ""
    if config.reference_name == "precomputed":
        _as_the_run_does(config, device)
        stored = f", reference scores of {config.draws} draws a row"
    return f"{len(rows)} rows cached in {cache_root(config)}{stored}, {len(problems)} refused"


def _only_whole(config: ExperimentConfig) -> str:
    """What of an experiment makes its caches one process's work; empty where shares are possible."""
    if config.on_answers or METHODS.get(config.method_name).batches in ("lists", "domains"):
        return f"method.name: '{config.method_name}'"
    return "data.buckets" if config.data.buckets else ""


def _as_the_run_does(config: ExperimentConfig, device: torch.device) -> str:
    """Prepare the run's inputs, which fills every cache it has, and leave it there."""
    from accelerate import Accelerator

    # Assembled as for training: stored scores must come from the kernels that the policy will use.
    from mmalign.experiment.assembly import assemble

    accelerator, parts = Accelerator(cpu=device.type == "cpu"), assemble(config, device)
    if config.on_answers:
        from mmalign.experiment.vlm_inputs import prepare_vlm

        inputs = prepare_vlm(config, parts, accelerator)
    else:
        inputs = prepare_inputs(config, parts.family, accelerator, parts.start)
    return f"{len(inputs.loader.order.rows)} rows cached in {cache_root(config)}, {inputs.quarantined} refused"


@dataclass(frozen=True, kw_only=True)
class TableJob:
    """What to cache of a table. Plain data, so that it can be handed to another process.

    Raises:
        ConfigError: an unknown kind, or a kind without the model or reward that it needs.
    """

    table: str
    kinds: tuple[str, ...]
    model: str | None = None
    """Diffusers folder or hub id, for ``vae`` and ``text``."""
    family: str | None = None
    """Name of the model's family; by default what the folder's ``model_index.json`` says."""
    dtype: str = "fp32"
    resolution: int | None = None
    flip: bool = False
    drop_caption: bool = False
    """Also store '' among the prompts."""
    rewards: tuple[str, ...] = ()
    """For ``scores`` and ``clip``."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Reward -> folder with its weights."""
    sampler: str = "midpoint"
    frames: int = 8
    max_side: int | None = None
    decoder: str = "pyav"
    """For ``frames``: pyav or torchcodec."""
    root: str | None = None
    """Folder of the caches; by default ``cache`` in the table's folder."""
    check: str = "online"
    device: str = "auto"

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ConfigError(
                f"--kind: {', '.join(unknown) or 'none given'}; known for a table are {', '.join(KINDS)}; vision, reflogp and "
                f"referr are filled from an experiment file: mmalign data cache CONFIG"
            )
        if set(self.kinds) & set(ENCODED) and not self.model:
            raise ConfigError("--model: the kinds vae and text need the model that encodes")
        if set(self.kinds) & {"scores", "clip"} and not self.rewards:
            raise ConfigError("--reward: the kinds scores and clip need at least one reward; see 'mmalign rewards list'")

    @property
    def folder(self) -> Path:
        """Where the caches are."""
        path = Path(self.table)
        return Path(self.root) if self.root else (path if path.is_dir() else path.parent) / "cache"

    def experiment(self) -> ExperimentConfig:
        """The settings of a run that would ask for the encoded kinds."""
        model = {"name": self.family or family_of(str(self.model)), "path": self.model, "dtype": self.dtype}
        data = {
            "manifest": self.table, "resolution": self.resolution, "flip": self.flip, "check": self.check,
            "drop_caption": 0.1 if self.drop_caption else 0.0, "cache": self.root or "auto",
        }  # fmt: skip
        values = {
            "method": {"name": "diffusion_dpo"}, "model": model, "data": data, "optim": {"lr": 1e-5, "steps": 1},
            "run": {"name": "cache", "device": self.device},
        }  # fmt: skip
        return decode(ExperimentConfig, Resolved(source="mmalign data cache", values=values, provenance={}))


def family_of(model: str) -> str:
    """The family that a diffusers folder says it is of.

    Raises:
        ConfigError: no such folder, or one of a family that is not known.
    """
    from mmalign.models.diffusion.folder import PIPELINES

    index = Path(model) / "model_index.json"
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"--model {model}: {index} cannot be read ({error}); name the family with --family") from error
    if name not in PIPELINES:
        raise ConfigError(f"--model {model}: a pipeline of the class {name}; known are {', '.join(PIPELINES)}")
    return PIPELINES[name]


def fill_table(
    job: TableJob, *, shard: tuple[int, int] = (0, 1), engine: Engine = "local", workers: int | None = None,
    gpus: float | None = None,
) -> list[str]:  # fmt: skip
    """Fill caches of a table; returns a line for each kind. Arguments as of `fill_caches`.

    Raises:
        DataError: a table of another kind than a cache is of, or too many bad rows.
    """
    if engine != "local":
        count = workers or 2
        for _ in each_part(
            partial(table_share_maker, job, count), range(count), engine=engine, workers=count, gpus=gpus, title="Caching"
        ):
            pass
    lines = []
    encoded = [kind for kind in job.kinds if kind in ENCODED]
    if encoded:
        lines.append(f"{', '.join(encoded)}: {fill_experiment(job.experiment(), shard=shard, kinds=encoded)}")
    for kind in job.kinds:
        if kind in ("scores", "clip"):
            lines.append(_fill_scores(job, kind, shard))
        elif kind == "frames":
            lines.append(_fill_frames(job, shard))
    return lines


def table_share_maker(job: TableJob, count: int) -> Callable[[int], int]:
    """What fills one of `count` shares of a table's caches, where this is called."""
    return lambda number: len(fill_table(job, shard=(number, count)))


def _fill_scores(job: TableJob, kind: str, shard: tuple[int, int]) -> str:
    from mmalign import rewards
    from mmalign.annotate import open_either
    from mmalign.data.progress import progress_bar
    from mmalign.scoring.stored import StoredScores
    from mmalign.scoring.stored import fill_table as fill

    table: PairTable | RankedTable = open_either(job.table)
    device = None if job.device == "auto" else job.device
    scorers = rewards.load(list(job.rewards), path=dict(job.paths), device=device, dtype=job.dtype)
    store = StoredScores(scorers, job.folder, embeddings=kind == "clip")
    rows = range(shard[0], len(table), shard[1])
    with progress_bar("Scoring", len(rows)) as advance:
        failed = fill(store, table, rows, advance=advance)
    return f"{kind}: {len(rows)} rows, {store.computed} computed, {failed} cannot be scored, in {job.folder / kind}"


def _fill_frames(job: TableJob, shard: tuple[int, int]) -> str:
    from mmalign.branches import VideoRef
    from mmalign.data import FrameCache, open_vlm
    from mmalign.data.vlm_rows import RowProblem
    from mmalign.media import Sampler
    from mmalign.types import ImageRef

    table = open_vlm(job.table)
    clips: dict[str, ImageRef] = {}
    bad = 0
    for row in range(shard[0], len(table), shard[1]):
        try:
            record = table.record(row)
        except RowProblem:
            bad += 1
            continue
        for item in (*record.media, *(item for answer in record.answers for item in answer.media or ())):
            if isinstance(item, VideoRef) and not item.frames:
                clips[item.path or f"row {row} {item.label}"] = ImageRef(path=item.path, data=item.data, label=item.label)
    store = FrameCache(job.folder, max_side=job.max_side, decoder=job.decoder)
    failed = store.fill(clips.values(), Sampler(name=job.sampler, count=job.frames), progress=True)
    lost = f", {bad} rows are defective" if bad else ""
    if failed:
        lost += f", {len(failed)} clips cannot be decoded, first {failed[0]}"
    return f"frames: {len(clips)} clips, {store.decoded} decoded{lost}, in {job.folder / 'frames'}"


__all__ = ["KINDS", "TableJob", "family_of", "fill_caches", "fill_experiment", "fill_table"]
