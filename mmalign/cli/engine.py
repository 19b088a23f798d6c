"""Options that the batch jobs share: which share of the work is this process's, and who makes the parts."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Engine = Annotated[
    Literal["local", "processes", "ray"],
    typer.Option(
        "--engine",
        help="Who makes the parts: this process, several of this machine, or the workers of a Ray cluster (RAY_ADDRESS, or one "
        "of this machine) that see the same folder.",
    ),
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="With another --engine than local: how many; by default as many as fit.")
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus", min=0.0, help="With --engine ray: accelerators of a worker, or a fraction; by default 1 if there are any."
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N", help="Make every N-th part from the I-th on; default: what the launcher says."
    ),
]
