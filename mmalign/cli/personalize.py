"""`mmalign personalize` and `mmalign users`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmalign.cli.groups import CommandGroup

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with personalized_dpo.")]
Pairs = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The person's choices: a pair table (JSONL or Parquet: id, prompt, chosen, rejected)."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(personalize)
    users = typer.Typer(
        name="users", no_args_is_help=True, help="The people a personalised run knows: list, add, remove, export.",
        rich_markup_mode=None, cls=CommandGroup,
    )  # fmt: skip
    for command in (list_users, add, remove, export):
        users.command("list" if command is list_users else None)(command)
    app.add_typer(users)


def personalize(
    run: Run,
    pairs: Pairs = None,
    prompts: Annotated[list[str] | None, typer.Option(metavar="TEXT|FILE", help="A prompt or a file; repeatable.")] = None,
    user: Annotated[str | None, typer.Option(metavar="NAME", help="Whose pictures; default: whom the pairs name.")] = None,
    mix: Annotated[str | None, typer.Option(metavar="A=0.3,B=0.7", help="A mixture of people instead; weights sum to 1.")] = None,
    mode: Annotated[
        Literal["embedding", "attention", "prediction"], typer.Option(help="What a mixture mixes.")
    ] = "prediction",
    user_scale: Annotated[float, typer.Option(help="Strength of the person's attention; 0 is the base model.")] = 1.0,
    user_guidance: Annotated[float, typer.Option(help="Push away from the base model, as guidance over the prompt does.")] = 1.0,
    images: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    fit: Annotated[
        int | None, typer.Option(metavar="STEPS", help="Learn the person in so many steps instead of reading the pairs once.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the pictures.")] = None,
) -> None:
    """Take in a person from at least 4 choices and make pictures for them.

    Without --pairs the person must be known (`mmalign users list RUN`). Writes pictures, a sheet with the base model beside
    them, and personal.json with all that made them.
    """
    from mmalign.errors import ConfigError
    from mmalign.personalize import parse_mix
    from mmalign.personalize import personalize as run_personalize

    if pairs is None and user is None and mix is None:
        raise ConfigError("whose pictures? give --pairs FILE, --user NAME or --mix A=0.3,B=0.7")
    made = run_personalize(
        run, pairs, _texts(prompts or []), user=user, mix=None if mix is None else parse_mix(mix), mode=mode, scale=user_scale,
        guidance=user_guidance, images_per_prompt=images, seed=seed, fit=fit, out=out,
    )  # fmt: skip
    who = ", ".join(f"{name} {weight:g}" for name, weight in made.mix.items())
    if made.pairs:
        typer.echo(f"taken in from {made.pairs} pairs")
    if made.prompts:
        typer.echo(f"{len(made.pictures)} pictures for {who}: {made.folder / 'grid.png'}")
    else:
        typer.echo("no prompts were given, so no pictures were made; --prompts \"a red circle\"")


def _texts(given: list[str]) -> list[str]:
    """Prompts as they are, and those in the files that are named."""
    from mmalign.experiment.prompts import read_prompts

    found: list[str] = []
    for text in given:
        found += [prompt for prompt, _ in read_prompts(text)] if Path(text).suffix in (".txt", ".jsonl") else [text]
    return found


def list_users(run: Run) -> None:
    """Show everybody: key, how they came in, from how many pairs. Names are shown only where they are kept."""
    entries = _store(run).entries()
    for entry in entries:
        typer.echo(f"{entry.key}  {entry.kind:8}  {len(entry.pairs):4d} pairs  {entry.name or ''}".rstrip())
    typer.echo(f"{len(entries)} users")


def add(
    run: Run,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    pairs: Annotated[Path, typer.Option(metavar="FILE", help="The person's choices, at least 4.")],
    fit: Annotated[int | None, typer.Option(metavar="STEPS", help="Learn the person in so many steps.")] = None,
) -> None:
    """Take in a person from their choices; somebody of this name is replaced."""
    from mmalign.personalize import personalize as run_personalize

    made = run_personalize(run, pairs, (), user=name, fit=fit)
    typer.echo(f"{_store(run).key(name)}  taken in from {made.pairs} pairs")


def remove(run: Run, name: Annotated[str, typer.Argument(metavar="NAME|KEY")]) -> None:
    """Delete a person's embedding and what is known of it.

    Pictures made for them, the pairs themselves and, where users were learned in training, checkpoints stay: delete those too.
    """
    entry = _store(run).remove(name)
    typer.echo(f"{entry.key} is removed from {run / 'users'}")
    if entry.kind == "trained":
        typer.echo("their pairs in data.manifest, and what training made of them in checkpoints/ and export/, stay until deleted")


def export(
    run: Run,
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .safetensors file.")],
    names: Annotated[list[str] | None, typer.Option("--user", metavar="NAME|KEY", help="Only these; repeatable.")] = None,
) -> None:
    """Write embeddings into one safetensors file, keys instead of names."""
    typer.echo(str(_store(run).export(out, names or ())))


def _store(run: Path):  # type: ignore[no-untyped-def]
    from mmalign.experiment.users import FOLDER
    from mmalign.models.users.store import UserStore

    return UserStore(run / FOLDER)
