"""``mmalign evaluate-video``: a model or a run on a benchmark file about films."""

from __future__ import annotations

from typing import Annotated

import typer

ROWS_FAILED = 3


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate-video")(evaluate_video)


def evaluate_video(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="What is asked of whom (YAML); see docs/temple.md.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change.")] = None,
) -> int:
    """Ask questions with options about films: files of Video-MME, MLVU, TempCompass or Vinoground.

    The files and films are the user's; nothing is downloaded. Prints accuracy with 95 % intervals, by group and by pair.
    """
    from mmalign.videobench.run import evaluate_video as run
    from mmalign.videobench.run import load_video_bench

    report = run(load_video_bench(config, overrides or []))
    typer.echo(str(report))
    return ROWS_FAILED if report.failed else 0
