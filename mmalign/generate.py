"""Candidates for ranking: several pictures a prompt from one or several models, with the seed of every one.

The first half of the Syn-Pic pipeline (arXiv:2410.18013 section 3), which takes one picture from each of four models; sampler,
steps and guidance are not given there. `annotate` scores what this makes.

The initial noise of a picture is ``torch.Generator().manual_seed(seed)`` filled over the latent's shape on the CPU, and the
seed follows from (run seed, model's label, candidate number, prompt id) alone: it does not depend on batches, shards or
interruptions.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mmalign.config import Section, Variants, decode, load_yaml
from mmalign.errors import ConfigError, DataError
from mmalign.models.diffusion import FAMILIES

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mmalign.data.engines import Engine
    from mmalign.data.partfolder import PartFolder
    from mmalign.models.diffusion.base import DiffusionFamily

SCHEMA_FIELDS = ("prompt_row", "seeds", "pictures")


class SourceConfig(Section):
    """One model and how to sample from it."""

    label: str
    """How the table names the model; also part of every seed."""
    model: Annotated[Section, Variants(FAMILIES, "model")]
    candidates: int = 1
    """Pictures per prompt from this model."""
    steps: int = 50
    """Sampling steps; the scheduler is the model's own."""
    guidance: float = 7.5
    batch_size: int = 8
    resolution: int | None = None
    """Side in pixels; default: the model's own."""


class GenerateConfig(Section):
    """What to generate."""

    prompts: str
    """Text file with a prompt a line, or JSONL with 'prompt'."""
    max_prompts: int | None = None
    sources: tuple[SourceConfig, ...]
    seed: int = 0
    out: str
    """Folder of the ranked table to write."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    prompts_per_part: int = 64
    """What an interruption can cost at most, per model."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        labels = [source.label for source in self.sources]
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"sources: at least one is needed, and their labels must differ, got {labels}")
        for source in self.sources:
            if min(source.candidates, source.steps, source.batch_size) < 1:
                raise ValueError(f"sources '{source.label}': candidates, steps and batch_size must be at least 1")
        if self.prompts_per_part < 1:
            raise ValueError(f"prompts_per_part must be at least 1, got {self.prompts_per_part}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateReport:
    """What came of a run."""

    path: Path | str | None
    """The finished table; None while other shards have parts to make."""
    prompts: int
    pictures: int
    """Made by this run."""
    missing: int
    """Parts that are still to be made by others."""

    def __str__(self) -> str:
        if self.path is None:
            return f"made {self.pictures} pictures; {self.missing} parts are left to other shards"
        if not self.prompts:
            return f"{self.path}: made by other shards"
        return f"{self.path}: {self.prompts} prompts; this run made {self.pictures} pictures"


def load_generation(path: str | Path, overrides: Sequence[str] = ()) -> GenerateConfig:
    """Read and check a file of settings.

    Raises:
        ConfigError: all problems in one error.
    """
    return decode(GenerateConfig, load_yaml(path, list(overrides)), str(path))


def generate(
    config: GenerateConfig, *, shard: tuple[int, int] = (0, 1), engine: Engine = "local", workers: int | None = None,
    gpus: float | None = None, progress: bool = True,
) -> GenerateReport:  # fmt: skip
    """Make the pictures that are not there yet; the process that finds all parts done writes the table.

    Args:
        shard: (i, n): make every n-th part from the i-th on. Shards may run at once, on machines that share the folder.
        engine: ``processes`` or ``ray`` have the parts made by others, which must see the same folder; the pictures are the same.
        workers, gpus: as of ``mmalign.data.engines.each_part``.

    Raises:
        ConfigError: a shard that does not exist, or no CUDA device where one was asked for.
        DataError: `out` is taken or holds parts of other settings.
        ModelError: a model cannot be loaded.
        MissingExtraError: Ray is not installed.
    """
    from mmalign.data.engines import each_part
    from mmalign.data.progress import progress_bar

    if not 0 <= shard[0] < shard[1]:
        raise ConfigError(f"--shard: {shard[0]}/{shard[1]} does not exist; shards are counted from 0")
    if shard[1] > 1 and _is_made(config):
        return GenerateReport(path=config.out, prompts=0, pictures=0, missing=0)
    maker = Maker(config)
    missing = maker.folder.missing(shard)
    if engine != "local":
        made = sum(each_part(partial(Maker, config), missing, engine=engine, workers=workers, gpus=gpus,
                             title="Generating", progress=progress))  # fmt: skip
    else:
        with progress_bar("Generating", sum(map(maker.pictures, missing)), enabled=progress) as advance:
            made = sum(maker(number, advance) for number in missing)
    left = len(maker.folder.missing())
    path = None if left else _assemble(config, maker.folder, maker.prompts, maker.chunks)
    return GenerateReport(path=path, prompts=len(maker.prompts), pictures=made, missing=left)


class Maker:
    """Makes parts, each some prompts' pictures from one model; a model is loaded when the first part needs it.

    Parts of one model have neighbouring numbers, so whoever makes them in order loads each model once.
    """

    def __init__(self, config: GenerateConfig) -> None:
        from mmalign.data.partfolder import PartFolder
        from mmalign.experiment.prompts import read_prompts

        self.config = config
        self.prompts = [prompt for prompt, _ in read_prompts(config.prompts, config.max_prompts)]
        self.chunks = -(-len(self.prompts) // config.prompts_per_part)
        job = {**config.model_dump(mode="json", exclude={"out", "device", "max_prompts"}), "prompts": self.prompts}
        self.folder = PartFolder(config.out, job, len(config.sources) * self.chunks)
        self._loaded: tuple[int, DiffusionFamily] | None = None

    def rows(self, number: int) -> range:
        """Prompts of a part."""
        return _rows(self.config, self.prompts, number % self.chunks)

    def pictures(self, number: int) -> int:
        """How many pictures a part holds."""
        return self.config.sources[number // self.chunks].candidates * len(self.rows(number))

    def __call__(self, number: int, advance: Callable[[int], None] = lambda _: None) -> int:
        """Make one part; returns the number of its pictures."""
        index = number // self.chunks
        source = self.config.sources[index]
        if self._loaded is None or self._loaded[0] != index:
            self._loaded = None  # before the next one is loaded, or both would be in memory
            self._loaded = (index, load_source(source, self.config.device))
        made = sample_candidates(self._loaded[1], source, self.config.seed, self.prompts, self.rows(number), advance)
        self.folder.write(number, made, _stage_schema())
        return self.pictures(number)


def _is_made(config: GenerateConfig) -> bool:
    """Whether other shards have finished the table of exactly these settings."""
    from mmalign.config import dump_yaml
    from mmalign.data.remote import address, is_remote, text_at

    if is_remote(config.out):
        return text_at(f"{address(config.out)}/generate.yaml") == dump_yaml(config)
    note = Path(config.out) / "generate.yaml"
    return note.exists() and note.read_text(encoding="utf-8") == dump_yaml(config)


def _rows(config: GenerateConfig, prompts: Sequence[str], chunk: int) -> range:
    return range(chunk * config.prompts_per_part, min((chunk + 1) * config.prompts_per_part, len(prompts)))


def load_source(source: SourceConfig, device: str) -> DiffusionFamily:
    import torch

    from mmalign.experiment.assembly import quiet_libraries
    from mmalign.models.diffusion.base import FamilyConfig

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but torch sees no CUDA device; use auto or cpu")
    settings = source.model
    if not isinstance(settings, FamilyConfig):
        raise ConfigError(f"sources '{source.label}': model is not a diffusion family")
    quiet_libraries()
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    return FAMILIES.get(settings.name).load(settings, device=where)  # type: ignore[attr-defined, no-any-return]


def candidate_seed(seed: int, label: str, number: int, prompt_id: str) -> int:
    """The seed of one picture's initial noise, 63 bits."""
    from mmalign import rng

    return rng.key(seed, f"candidate/{label}", number, prompt_id)


def initial_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """The initial noise that a stored seed stands for, float32 on the CPU."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt_id(row: int, prompt: str) -> str:
    """Id of a prompt's list: its place in the file and what it says."""
    import hashlib

    return f"{row}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"


def sample_candidates(
    family: DiffusionFamily, source: SourceConfig, seed: int, prompts: Sequence[str], rows: range, advance: Any
) -> list[dict[str, Any]]:
    """All candidates of some prompts from one model: a row per prompt."""
    import torch

    channels, height, width = family.latent_shape
    if source.resolution is not None:
        if source.resolution % family.image_multiple:
            raise ConfigError(
                f"sources '{source.label}': resolution {source.resolution} is not a multiple of {family.image_multiple}"
            )
        height = width = source.resolution // family.latent_factor
    wanted = [(row, number) for row in rows for number in range(source.candidates)]
    seeds = [candidate_seed(seed, source.label, number, prompt_id(row, prompts[row])) for row, number in wanted]
    noise = torch.stack([initial_noise(value, (channels, height, width)) for value in seeds])
    pictures = family.sample(
        family.network, [prompts[row] for row, _ in wanted], noise, steps=source.steps, guidance=source.guidance,
        batch_size=source.batch_size, progress=advance,
    )  # fmt: skip
    made = []
    for place, row in enumerate(rows):
        own = range(place * source.candidates, (place + 1) * source.candidates)
        made.append(
            {"prompt_row": row, "seeds": [seeds[at] for at in own], "pictures": [_png(pictures[at]) for at in own]}
        )
    return made


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _stage_schema() -> Any:
    import pyarrow as pa

    kinds = (pa.int64(), pa.list_(pa.int64()), pa.list_(pa.binary()))
    return pa.schema(list(zip(SCHEMA_FIELDS, kinds, strict=True)))


def _assemble(config: GenerateConfig, stage: PartFolder, prompts: Sequence[str], chunks: int) -> Path | str:
    """Join the models' pictures of each prompt into one list, and name the table."""
    from mmalign.config import dump_yaml
    from mmalign.data.partfolder import PartFolder
    from mmalign.data.schema import ranked_schema

    stage.fetch()
    out, made = stage.out, stage.building / "table"
    try:
        if not made.exists():
            table = PartFolder(made, {"of": stage.building.name}, chunks)
            for chunk in table.missing():
                by_model = [stage.rows(index * chunks + chunk) for index in range(len(config.sources))]
                lists = [_list(config, prompts, rows) for rows in zip(*by_model, strict=True)]
                table.write(chunk, lists, ranked_schema())
            table.finish({"generate.yaml": dump_yaml(config)})
        stage.clear()
        made.rename(out)
    except (OSError, DataError) as error:
        if any(out.glob("part-*.parquet")):  # another shard found all parts done at the same moment
            return out
        raise DataError(f"{out}: cannot be written: {error}") from error
    where = stage.deliver()
    stage.discard()
    return where


def _list(config: GenerateConfig, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One prompt with the candidates of all models, in the order of the settings."""
    row = rows[0]["prompt_row"]
    pairs = list(zip(config.sources, rows, strict=True))
    candidates = [
        {"model": source.label, "seed": seed, "steps": source.steps, "guidance": source.guidance}
        for source, found in pairs for seed in found["seeds"]
    ]  # fmt: skip
    pictures = [picture for _, found in pairs for picture in found["pictures"]]
    return {
        "id": prompt_id(row, prompts[row]), "prompt": prompts[row],
        "images": [{"bytes": picture, "path": None} for picture in pictures], "user": None,
        "meta": json.dumps({"candidates": candidates}),
    }  # fmt: skip
