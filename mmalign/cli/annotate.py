"""`mmalign annotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmalign.cli.engine import Engine, Gpus, Shard, Workers
from mmalign.cli.naming import by_name

ROWS_FAILED = 3


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("annotate")(annotate)


def annotate(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A table of ranked lists or of pairs, or of lists of answers.")],
    reward: Annotated[
        str, typer.Option(help="Reward names, or judges of answers (mmalign list judges), comma-separated.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new table.")],
    path: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER: local weights of a reward; may be repeated.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per forward; by device if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of encoders: fp32, bf16, fp16.")] = None,
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Never download.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of caches: scores are looked up there first, and kept for other tables.")
    ] = None,
    shard: Shard = None,
    engine: Engine = "local",
    workers: Workers = None,
    gpus: Gpus = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 if any score is missing.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME.KEY=VALUE", help="Setting of a judge of answers, e.g. green-api.retries=8; may be repeated."),
    ] = None,
    replies: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where replies of judges that are models are kept; OUT.replies.jsonl.")
    ] = None,
) -> int:
    """Write scores of rewards into a new table; lists of pictures also gain win rates, ranks, soft labels and disagreement.

    Lists of answers are read by judges of answers, each answer with its counts and errors in annotate/judgements.jsonl. Goes on
    where an interrupted run stopped; a judge that is a model is asked for nothing twice. The summary names each reward's lowest
    and highest score.
    """
    from mmalign.annotate import annotate as run
    from mmalign.data.jobs import shard_of
    from mmalign.data.vlm import is_vlm
    from mmalign.errors import DataError

    paths = by_name(path, "--path", "FOLDER")
    names = [name.strip() for name in reward.split(",") if name.strip()]
    if is_vlm(source):
        if shard is not None or engine != "local" or cache is not None or path:
            raise DataError(f"{source}: lists of answers are judged by one process; leave out --shard, --engine, --cache, --path")
        return _judged(source, out, names, option or [], replies, strict=strict)
    if option or replies:
        raise DataError(f"{source}: --option and --replies belong to judges of answers, and this table holds pictures")
    report = run(
        source, out, names, paths=paths, device=device, dtype=dtype, batch_size=batch_size, local_files_only=local_files_only,
        shard=shard_of(shard), engine=engine, workers=workers, gpus=gpus, cache=cache,
    )  # fmt: skip
    if report is None:
        typer.echo(f"{out}: this share is done; whoever finishes last writes the table")
        return 0
    typer.echo(str(report))
    if report.failed:
        return 2 if strict else ROWS_FAILED
    return 0


def _judged(source: Path, out: Path, names: list[str], options: list[str], replies: Path | None, *, strict: bool) -> int:
    """The same for lists of answers."""
    import yaml

    from mmalign.errors import DataError
    from mmalign.sampling.judging import judge_lists

    given: dict[str, dict[str, Any]] = {}
    for item in options:
        key, separator, value = item.partition("=")
        judge, dot, setting = key.rpartition(".")
        if not (separator and dot):
            raise DataError(f"--option {item}: expected NAME.KEY=VALUE, e.g. green-api.retries=8")
        given.setdefault(judge, {})[setting] = yaml.safe_load(value)
    unused = sorted(set(given) - {part for name in names for part in name.split(":")})
    if unused:
        raise DataError(f"--option: no judge named {', '.join(unused)} is asked")
    report = judge_lists(source, out, names, options=given, replies=replies)
    typer.echo(str(report))
    return (2 if strict else ROWS_FAILED) if report.failed else 0
