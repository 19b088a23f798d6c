"""`mmalign annotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmalign.cli.engine import Engine, Gpus, Shard, Workers

ROWS_FAILED = 3


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("annotate")(annotate)


def annotate(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A table of ranked lists or of pairs.")],
    reward: Annotated[str, typer.Option(help="Reward names, comma-separated; see 'mmalign rewards list'.")],
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
) -> int:
    """Write scores of rewards into a new table; lists also gain win rates, ranks, soft labels and disagreement.

    Goes on where an interrupted run stopped. The summary names each reward's lowest and highest score.
    """
    from mmalign.annotate import annotate as run
    from mmalign.data.jobs import shard_of
    from mmalign.errors import DataError

    paths = {}
    for item in path or []:
        name, separator, folder = item.partition("=")
        if not separator:
            raise DataError(f"--path {item}: expected NAME=FOLDER")
        paths[name] = folder
    names = [name.strip() for name in reward.split(",") if name.strip()]
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
