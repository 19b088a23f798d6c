"""`mmalign rewards fit-pal|fit-user|forget-user|test-pal`: rewards that differ between people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ROWS_FAILED = 3
_PAL = Annotated[Path, typer.Argument(metavar="PAL", help="Folder of a PAL head.")]
_ENCODER = Annotated[Path | None, typer.Option(help="Local weights of the encoder, where they have moved.")]
_DEVICE = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
_DTYPE = Annotated[str | None, typer.Option(help="Precision of the encoder: fp32, bf16, fp16.")]


def register(group: typer.Typer) -> None:
    """Add the commands to the group `rewards`."""
    group.command("fit-pal")(fit_pal)
    group.command("fit-user")(fit_user)
    group.command("forget-user")(forget_user)
    group.command("test-pal")(test_pal)


def fit_pal(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="What to fit (YAML), e.g. configs/pal/tiny.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change.", show_default=False)
    ] = None,
) -> int:
    """Fit a PAL head (arXiv:2406.08469) on pairs with user names; the reward is then pal:FOLDER."""
    from mmalign.scoring.pal import fit_pal as run
    from mmalign.scoring.pal import load_config

    report = run(load_config(config, overrides or []))
    typer.echo(str(report))
    return ROWS_FAILED if report.left_out else 0


def fit_user(
    place: _PAL,
    pairs: Annotated[Path, typer.Option(help="Table of pairs, or a folder of votes from mmalign arena.")],
    user: Annotated[str, typer.Option(help="Whose rows of it to fit; scores name the user so.")],
    encoder_path: _ENCODER = None,
    device: _DEVICE = None,
    dtype: _DTYPE = None,
) -> int:
    """Add a user to a PAL head from a few of their pairs; everything else in it stays as it is."""
    from mmalign.scoring.pal_users import add_user

    report = add_user(place, pairs, user, encoder_path=str(encoder_path) if encoder_path else None, device=device, dtype=dtype)
    typer.echo(str(report))
    return ROWS_FAILED if report.left_out else 0


def forget_user(place: _PAL, user: Annotated[str, typer.Argument(help="Name of the user.")]) -> int:
    """Remove a user's weights from a PAL head. What their pairs did to the shared head stays in it."""
    from mmalign.scoring.pal_users import forget_user as run

    run(place, user)
    typer.echo(f"{place}: user '{user}' is forgotten")
    return 0


def test_pal(
    place: _PAL,
    pairs: Annotated[Path, typer.Option(help="Table of pairs that the fit did not see.")],
    shots: Annotated[str, typer.Option(help="Numbers of pairs a new user is fitted on, comma-separated.")] = "0,4,8,16,32",
    seed: Annotated[int, typer.Option(help="Of the halves of a new user's pairs.")] = 0,
    encoder_path: _ENCODER = None,
    device: _DEVICE = None,
    dtype: _DTYPE = None,
) -> int:
    """Accuracy on other pairs: of known users, and of new ones as a function of how many of their pairs are fitted."""
    from mmalign.errors import ConfigError
    from mmalign.scoring.pal_users import measure_pal

    words = [word.strip() for word in shots.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--shots {shots}: expected numbers, e.g. 0,4,8,16,32")
    report = measure_pal(
        place, pairs, shots=[int(word) for word in words], seed=seed,
        encoder_path=str(encoder_path) if encoder_path else None, device=device, dtype=dtype,
    )  # fmt: skip
    typer.echo(str(report))
    return ROWS_FAILED if report.left_out else 0
