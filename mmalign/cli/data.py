"""``mmalign data …``: bring preference data in, check it, look at it, make pairs, fill caches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmalign.cli.engine import Engine, Gpus, Shard
from mmalign.cli.groups import CommandGroup

if TYPE_CHECKING:
    from mmalign.data.tables import PairTable

ROWS_FAILED = 3

commands = typer.Typer(
    name="data",
    cls=CommandGroup,
    help="Bring preference data in, check it, look at it, make pairs, fill caches.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    from mmalign.cli import relabel  # noqa: F401  (adds its command to the group)

    app.add_typer(commands)


Table = Annotated[Path, typer.Argument(help="A table: a folder of Parquet parts, one such file, or a JSONL file.")]
CachePlace = Annotated[Path, typer.Argument(metavar="TABLE|CACHE", help="A table's folder, or a folder of caches.")]
Strict = Annotated[bool, typer.Option("--strict", help="Any bad row is an error (exit code 2).")]


@commands.command("import")
def import_source(
    source: Annotated[
        list[str], typer.Argument(metavar="[FORMAT] SOURCE", help="File or folder of the source; its format may stand before it.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    format: Annotated[
        str | None, typer.Option("--from", "--format", help="Source format (mmalign list formats); found by itself.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which split, where the source has several.")] = None,
    media: Annotated[
        Path | None, typer.Option(help="Folder that paths of pictures and clips start from; by default the source's.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the format; may be repeated.")
    ] = None,
    strict: Strict = False,
) -> int:
    """Turn a source format into a table that training reads.

    Example: mmalign data import downloads/pickapic_v2 --split train --out data/pickapic
    """
    from mmalign import data
    from mmalign.errors import ConfigError, DataError

    if len(source) > 2 or (len(source) == 2 and format not in (None, source[0])):
        raise ConfigError(f"data import {' '.join(source)}: expected one SOURCE, or FORMAT SOURCE")
    where, named = source[-1], source[0] if len(source) == 2 else format
    report = data.import_table(where, out, format=named, split=split, media=media, options=_settings(settings))
    typer.echo(str(report))
    if report.quarantined and strict:
        raise DataError(f"{report.quarantined} bad rows in {where}, and --strict allows none; the table was written")
    return ROWS_FAILED if report.quarantined else 0


@commands.command()
def select(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A file of thresholds (YAML), e.g. configs/select/temple.yaml.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change.")] = None,
) -> int:
    """Choose films that teach order: cut them into shots, leave out blurred, static and repetitive ones.

    Writes films.jsonl (a table of questions whose meta names the clips of each film, for `mmalign generate` with sampler
    temple), refused.jsonl with a reason each, and selection.html with pictures of both. Needs the extra scenedetect, or
    weights of TransNetV2.
    """
    from mmalign.selection.run import select as run_selection
    from mmalign.selection.settings import load_selection

    report = run_selection(load_selection(config, overrides or []))
    typer.echo(str(report))
    return ROWS_FAILED if report.failed else 0


@commands.command()
def export(
    table: Table,
    to: Annotated[Literal["trl", "ms-swift", "pickapic"], typer.Option("--to", help="Format to write.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to make; by default TABLE-FORMAT.")] = None,
) -> int:
    """Write a table in another tool's format; importing the result gives the same table again.

    Pairs of pictures go to pickapic, answers about pictures and clips to trl or ms-swift.
    """
    from mmalign import data

    report = data.export_table(table, out or table.with_name(f"{table.stem}-{to}"), to=to)
    typer.echo(str(report))
    return ROWS_FAILED if report.counts else 0


@commands.command()
def check(
    table: Table,
    ties: Annotated[
        Literal["drop", "soft"], typer.Option(help="Leave ties out, or keep them as soft labels.")
    ] = "drop",
    duplicates: Annotated[Literal["drop", "keep"], typer.Option(help="Equal verdicts on equal pairs.")] = "drop",
    max_aspect: Annotated[float, typer.Option(help="Longer over shorter side; beyond it a row is dropped.")] = 4.0,
    min_side: Annotated[int, typer.Option(help="Pixels; a row with a shorter side is dropped.")] = 1,
    max_bad_fraction: Annotated[float, typer.Option(help="More bad rows than this share are an error.")] = 0.01,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding processes; one per core by default.")] = None,
    shard: Shard = None,
    engine: Engine = "local",
    strict: Strict = False,
) -> int:
    """Decode every picture and clip once; report which rows can be used and why not the others.

    Writes check/report.html (with pictures of what was refused), report.md, report.json and quarantine.jsonl into the
    table's folder (or NAME.check/ beside a single file). A check that was stopped goes on where it was. Training with
    data.check: required asks for this.
    """
    from mmalign import data
    from mmalign.data.checkfiles import check_folder
    from mmalign.data.checking import check_any
    from mmalign.data.jobs import shard_of
    from mmalign.data.lookparts import PartsMissing

    policy = data.CheckPolicy(
        ties=ties,
        duplicates=duplicates,
        max_aspect=max_aspect,
        min_side=min_side,
        max_bad_fraction=max_bad_fraction,
        strict=strict,
    )
    try:
        result = check_any(table, policy=policy, workers=workers, shard=shard_of(shard), engine=engine)
    except PartsMissing as left:
        typer.echo(f"{table}: {left}")
        return 0
    typer.echo(f"{table}: checked")
    typer.echo(result.table_text())
    folder = check_folder(table)
    if result.problems:
        typer.echo(f"  listed in {folder / 'quarantine.jsonl'}, shown in {folder / 'report.html'}")
    return ROWS_FAILED if result.quarantined else 0


@commands.command()
def stats(table: Table) -> None:
    """Count rows, labels, prompts, users and, for a checked table, picture sizes."""
    from mmalign import data
    from mmalign.data import statistics, vlm_statistics
    from mmalign.data.vlm import is_vlm, open_vlm

    lines = vlm_statistics.describe(open_vlm(table)) if is_vlm(table) else statistics.describe(data.open_table(table))
    for name, value in lines:
        typer.echo(f"{name:<18}  {value}")


@commands.command()
def show(
    table: Table,
    row: Annotated[str, typer.Option("--row", help="Id of the row, or its number in the table from 0.")],
    save: Annotated[Path | None, typer.Option(help="Folder to write the two pictures to, as they are stored.")] = None,
) -> None:
    """Print one row, and what its pictures are."""
    from mmalign import data
    from mmalign.data.statistics import find_row, show_row
    from mmalign.data.vlm import is_vlm, open_vlm

    if is_vlm(table):
        from mmalign.data import vlm_statistics

        answers = open_vlm(table)
        for name, value in vlm_statistics.show_row(answers, vlm_statistics.find_row(answers, row)):
            typer.echo(f"{name:<12}  {value}")
        return
    opened = data.open_table(table)
    number = find_row(opened, row)
    for name, value in show_row(opened, number):
        typer.echo(f"{name:<12}  {value}")
    if save is not None:
        for path in _save(opened, number, save):
            typer.echo(f"wrote {path}")


@commands.command()
def pairs(
    ranked: Annotated[
        Path,
        typer.Argument(help="Ranked lists (id, prompt, images, scores) or lists of answers (prompt, answers, scores)."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new table.")],
    rule: Annotated[Literal["best_worst", "all_pairs"], typer.Option(help="Which pairs a list gives.")] = "best_worst",
    reward: Annotated[str | None, typer.Option(help="Whose scores rank; needed when there are several.")] = None,
    min_margin: Annotated[float, typer.Option(help="Smallest difference of scores that makes a pair.")] = 0.0,
    soft: Annotated[bool, typer.Option("--soft", help="p_chosen = sigmoid(difference) instead of 1.")] = False,
    max_length_ratio: Annotated[
        float | None, typer.Option(help="Answers: leave out pairs of which one has more than so many times the other's words.")
    ] = None,
    balance_lengths: Annotated[
        bool, typer.Option("--balance-lengths", help="Answers: leave out pairs until both sides are about equally long.")
    ] = False,
    strict: Strict = False,
) -> int:
    """Make preference pairs from ranked lists of pictures or of answers."""
    from mmalign import data
    from mmalign.data.vlm import is_vlm
    from mmalign.errors import DataError

    report: Any
    if is_vlm(ranked):
        from mmalign.sampling.pairs import make_answer_pairs

        report = make_answer_pairs(
            ranked, out, rule=rule, reward=reward, min_margin=min_margin, soft=soft, max_length_ratio=max_length_ratio,
            balance_lengths=balance_lengths,
        )  # fmt: skip
    elif max_length_ratio is not None or balance_lengths:
        raise DataError(f"{ranked}: --max-length-ratio and --balance-lengths are for answers, and this table holds pictures")
    else:
        report = data.make_pairs(ranked, out, rule=rule, reward=reward, min_margin=min_margin, soft=soft)
    typer.echo(str(report))
    if report.quarantined and strict:
        raise DataError(f"{report.quarantined} bad rows in {ranked}, and --strict allows none; the table was written")
    return ROWS_FAILED if report.quarantined else 0


@commands.command()
def cache(
    what: Annotated[Path, typer.Argument(metavar="CONFIG|TABLE", help="Experiment file, or a table with --kind.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Changed settings.")] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Of a table: vae, text, clip, scores, frames; comma-separated.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="For vae and text: diffusers folder or hub id.")] = None,
    family: Annotated[str | None, typer.Option(help="Family of the model; by default what its folder says.")] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the encoders: fp32, bf16, fp16.")] = "fp32",
    resolution: Annotated[int | None, typer.Option(min=1, help="Side in pixels; by default the model's own.")] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Also store the latents of mirrored pictures.")] = False,
    drop_caption: Annotated[bool, typer.Option("--drop-caption", help="Also store the empty prompt.")] = False,
    reward: Annotated[str, typer.Option(help="For scores and clip: reward names, comma-separated.")] = "",
    path: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER: local weights of a reward; may be repeated.")] = None,
    sampler: Annotated[str, typer.Option(help="For frames: midpoint, interior, linspace, fps:X, at:T1,T2.")] = "midpoint",
    frames: Annotated[int, typer.Option(min=1, help="For frames: how many (fps: at most).")] = 8,
    max_side: Annotated[int | None, typer.Option(min=1, help="For frames: longer side to reduce them to.")] = None,
    decoder: Annotated[Literal["pyav", "torchcodec"], typer.Option(help="For frames: what decodes clips.")] = "pyav",
    root: Annotated[Path | None, typer.Option("--cache", help="Folder of the caches; by default cache/ in the table's.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to encode.")] = "auto",
    shard: Shard = None,
    engine: Engine = "local",
    workers: Annotated[int | None, typer.Option("--workers", "--processes", min=1, help="Share the work among so many.")] = None,
    gpus: Gpus = None,
) -> None:
    """Fill caches ahead of a run: those of an experiment, or named kinds of a table.

    Several processes, on machines that share the folder, fill one cache together: accelerate launch -m mmalign data cache CONFIG.
    Example: mmalign data cache data/mine --kind vae,text --model models/sd15 --resolution 512
    """
    from mmalign.data.jobs import shard_of
    from mmalign.errors import ConfigError

    share, engine = shard_of(shard), "processes" if engine == "local" and workers and workers > 1 else engine
    if kind is None:
        from mmalign.experiment import fill_caches

        if what.is_dir() or what.suffix in (".parquet", ".arrow", ".jsonl", ".ndjson"):
            raise ConfigError(f"{what} is a table: name what to cache of it with --kind, e.g. --kind vae,text --model FOLDER")
        typer.echo(fill_caches(what, overrides or [], shard=share, engine=engine, workers=workers, gpus=gpus))
        return
    if overrides:
        raise ConfigError(f"{' '.join(overrides)}: settings are changed of an experiment file; a table has options")
    from mmalign.experiment.caching import TableJob, fill_table

    job = TableJob(
        table=str(what), kinds=_names(kind), model=model, family=family, dtype=dtype, resolution=resolution, flip=flip,
        drop_caption=drop_caption, rewards=_names(reward), paths=_settings(path, "--path", "NAME=FOLDER"), sampler=sampler,
        frames=frames, max_side=max_side, decoder=decoder, root=None if root is None else str(root), device=device,
    )  # fmt: skip
    for line in fill_table(job, shard=share, engine=engine, workers=workers, gpus=gpus):
        typer.echo(line)


@commands.command("cache-info")
def cache_info(
    where: CachePlace,
    fields: Annotated[bool, typer.Option("--fields", help="Also print what each cache's numbers depend on.")] = False,
) -> None:
    """List caches: kind, entries, size, age, and what is wrong at a glance."""
    import json

    from mmalign.data import upkeep

    for info in upkeep.list_caches(upkeep.cache_root(where)):
        typer.echo(info.line)
        if fields:
            typer.echo(f"    {json.dumps(info.fields, sort_keys=True)}")


@commands.command()
def verify(where: CachePlace) -> int:
    """Compare every cache shard with its checksum. Changes nothing."""
    from mmalign.data import upkeep

    wrong = upkeep.verify(upkeep.cache_root(where))
    for line in wrong:
        typer.echo(line)
    typer.echo("all shards are sound" if not wrong else f"{len(wrong)} problems")
    return ROWS_FAILED if wrong else 0


@commands.command()
def prune(
    where: CachePlace,
    kind: Annotated[str | None, typer.Option(help="Only caches of this kind: vae, text, ...")] = None,
    days: Annotated[float | None, typer.Option(help="Only caches not written to for so many days.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """List caches that may go (those set aside; with --kind or --days also others), ask, and remove them."""
    from mmalign.data import upkeep

    chosen = upkeep.to_prune(upkeep.cache_root(where), kind=kind, older_than_days=days)
    for info in chosen:
        typer.echo(info.line)
    if not chosen:
        typer.echo("nothing to remove")
        return
    if yes or typer.confirm(f"remove these {len(chosen)} caches?"):
        typer.echo(f"{upkeep.prune(chosen) / 1e6:,.1f} MB are free again")


@commands.command()
def bench(
    table: Table,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs of a batch.")] = 32,
    resolution: Annotated[int, typer.Option(min=1, help="Side of the training pictures in pixels.")] = 512,
    workers: Annotated[int, typer.Option(min=0, help="Threads of the loader.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long each stage is measured.")] = 2.0,
) -> None:
    """Measure pairs a second of every stage from the table to the batch, and name the slowest."""
    from mmalign import data
    from mmalign.data.benching import bench as measure

    opened = data.open_table(table)
    checked = data.usable_rows(opened, check="online")
    typer.echo(str(measure(opened, checked, batch_size=batch_size, resolution=(resolution, resolution), workers=workers,
                           seconds=seconds)))  # fmt: skip


def _settings(given: list[str] | None, option: str = "--set", form: str = "NAME=VALUE") -> dict[str, str]:
    from mmalign.errors import ConfigError

    found = {}
    for item in given or []:
        name, sign, value = item.partition("=")
        if not sign:
            raise ConfigError(f"{option} {item}: expected {form}")
        found[name] = value
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _save(table: PairTable, number: int, folder: Path) -> list[Path]:
    from mmalign.data.files import atomic_file
    from mmalign.media import image_kind, read_bytes

    raw = table.raw(number)
    written = []
    for side, ref in (("chosen", raw.chosen), ("rejected", raw.rejected)):
        content, _ = read_bytes(ref)
        kind = image_kind(content)
        path = folder / f"row-{number}-{side}.{kind.pillow.lower() if kind else 'bin'}"
        with atomic_file(path) as handle:
            handle.write(content)
        written.append(path)
    return written
