"""``mmalign data relabel``: pairs of answers conditioned on their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmalign.cli.data import Table, commands


@commands.command()
def relabel(
    table: Table,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    reward: Annotated[str, typer.Option("--reward", help="Which of the table's scores is asked for.")],
    low: Annotated[float, typer.Option("--low", help="Lowest score there is.")],
    high: Annotated[float, typer.Option("--high", help="Best score there is: what to ask for when the model is used.")],
    template: Annotated[
        str | None, typer.Option("--template", help="Words before the question, with {score}, {low} and {high}.")
    ] = None,
    digits: Annotated[int, typer.Option("--digits", help="Decimals of a score in the question.")] = 2,
) -> int:
    """Make every pair of answers two, each asked for at the score of one answer (reward-augmented data, arXiv:2410.08067).

    Asked for the rejected answer's score, the rejected answer is preferred. Any pairwise method trains on the result.
    """
    from mmalign.sampling import relabel as relabelling

    made = relabelling.relabel_table(
        table, out, reward=reward, low=low, high=high, template=template or relabelling.TEMPLATE, digits=digits
    )
    left = ", ".join(f"{reason} {count}" for reason, count in sorted(made.left_out.items()))
    typer.echo(f"{out}: {made.rows} rows" + (f"; pairs left out: {left}" if left else ""))
    return 0
