"""`mmalign generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmalign.cli.engine import Engine, Gpus, Shard, Workers

ROWS_FAILED = 3


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)


def generate(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="What to generate (YAML), e.g. configs/generate/tiny.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change.", show_default=False)
    ] = None,
    shard: Shard = None,
    engine: Engine = "local",
    workers: Workers = None,
    gpus: Gpus = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 if any row of a table of questions failed.")] = False,
) -> int:
    """Sample pictures from prompts, or, where the file has a key `sampler`, answers to questions about pictures and clips.

    Pictures: several a prompt from one or several models into a table of lists, ready for `mmalign annotate`. Answers: pairs or
    lists, ready for training; see docs/sampling_answers.md. Goes on where an interrupted run stopped. Shards may run at once
    on machines that share the folder; the last one to finish writes the table.
    """
    from mmalign.data.jobs import shard_of
    from mmalign.sampling.settings import asks_for_answers

    part, settings = shard_of(shard), overrides or []
    if asks_for_answers(config, settings):
        from mmalign.sampling.job import sample_answers
        from mmalign.sampling.settings import load_sampling

        report = sample_answers(load_sampling(config, settings), shard=part, engine=engine, workers=workers, gpus=gpus)
        typer.echo(str(report))
        return (2 if strict else ROWS_FAILED) if report.failed else 0
    from mmalign.generate import generate as run
    from mmalign.generate import load_generation

    typer.echo(str(run(load_generation(config, settings), shard=part, engine=engine, workers=workers, gpus=gpus)))
    return 0
