"""`mmalign arena`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("arena")(arena)


def arena(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A folder of pictures with prompts, a table of pairs or ranked lists, or a generate YAML."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of a YAML to change.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the votes (pairs.jsonl, media/); gone on with if there.")] = Path("votes"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8420,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own let everybody vote.")
    ] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name under which other machines find the page; may be repeated.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures of a folder.")] = None,
    goal: Annotated[int, typer.Option(min=1, help="Choices a person is asked for.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the order of pairs.")] = 0,
    run: Annotated[Path | None, typer.Option(help="A personalised run: makes pictures for a person after 4 choices.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompt file of these pictures.")] = None,
) -> int:
    """Serve a local page where people choose between two pictures; their votes are a table of pairs. Ends with Ctrl-C.

    A vote is on the disk before the page says so. Only this machine can reach the page unless --host says otherwise.
    """
    from mmalign.arena.running import ArenaSettings, serve

    settings = ArenaSettings(
        source=source, out=out, host=host, port=port, names=tuple(allow_host or ()), prompt=prompt, goal=goal, seed=seed, run=run,
        prompts=prompts, overrides=tuple(overrides or ()),
    )  # fmt: skip
    serve(settings, lambda line: typer.echo(line))
    return 0
