"""`mmalign rewards`: what there is, what it means, and tools around weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmalign.cli import pal
from mmalign.cli.groups import CommandGroup
from mmalign.cli.naming import by_name


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(help="Rewards: list, cards, weights, server.", no_args_is_help=True, cls=CommandGroup)
    group.command("list")(list_rewards)
    group.command("show")(show)
    group.command("fetch")(fetch)
    group.command("convert")(convert)
    group.command("verify")(verify)
    group.command("serve")(serve)
    pal.register(group)
    app.add_typer(group, name="rewards")


def list_rewards() -> int:
    """Every reward with a one-line meaning. Judges of answers: mmalign list judges."""
    from mmalign import rewards

    width = max(len(name) for name in rewards.list())
    for name in rewards.list():
        card = rewards.card(name)
        missing = f"  [not available: {card.unavailable}]" if card.unavailable else ""
        typer.echo(f"{name:<{width}}  {card.summary}{missing}")
    return 0


def show(name: Annotated[str, typer.Argument(help="Reward name.")]) -> int:
    """The card of one reward: formula, range, weights, licence, size, published accuracies."""
    from mmalign import rewards

    card = rewards.card(name)
    for key, value in card.as_dict().items():
        if value in ("", 0, 0.0, {}) or value is None:
            continue
        if isinstance(value, dict):
            typer.echo(f"{key}:")
            for item, text in value.items():
                typer.echo(f"  {item}: {text}")
        else:
            typer.echo(f"{key}: {value}")
    if card.parameters_millions:
        typer.echo(f"memory of the weights: {card.bytes(4) / 1e9:.2f} GB in fp32, {card.bytes(2) / 1e9:.2f} GB in bf16")
    typer.echo("higher_is_better: True")
    return 0


def fetch(name: Annotated[str, typer.Argument(help="Reward name.")]) -> int:
    """Download the weights of a reward into the ordinary hub cache."""
    from mmalign import rewards
    from mmalign.rewards.hub import local_weights

    card = rewards.card(name)
    typer.echo(f"{card.weights or 'no weights'}: about {card.bytes(4) / 1e9:.2f} GB")
    revision = name.partition("@")[2] or None
    typer.echo(str(local_weights(rewards.LoadRequest(name=card.name, card=card, revision=revision))))
    return 0


def convert(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="[mps] FILE OUT", help="A third-party pickled checkpoint, and the safetensors file to write."),
    ],
) -> int:
    """Extract the tensors of a pickled checkpoint without running any of its code. All layouts are read the same way, so
    naming the reward before FILE is allowed and changes nothing."""
    from mmalign.errors import DataError
    from mmalign.rewards.convert import convert_checkpoint

    if len(files) == 3 and str(files[0]) == "mps":
        files = files[1:]
    if len(files) != 2:
        raise DataError(f"expected FILE and OUT, got {len(files)} names: {' '.join(map(str, files))}")
    source, out = files
    names = convert_checkpoint(source, out)
    typer.echo(f"{len(names)} tensors -> {out}")
    return 0


def verify(
    name: Annotated[str, typer.Argument(help="Reward name.")],
    path: Annotated[Path | None, typer.Option(help="Local weights.")] = None,
) -> int:
    """Load a reward and print what decides its numbers: weights hash, precision, preprocessing."""
    from mmalign import rewards

    backend = rewards.load_backend(name, path, "cpu", "fp32")
    for key, value in {"reward": backend.name, "formula": backend.card.formula, **backend.record()}.items():
        typer.echo(f"{key}: {value}")
    return 0


def serve(
    reward: Annotated[str, typer.Option(help="Reward names, comma-separated.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8321,
    path: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER: local weights; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16.")] = None,
) -> int:
    """Answer scoring requests over HTTP with JSON; ends with Ctrl-C."""
    from mmalign import rewards
    from mmalign.errors import RewardError
    from mmalign.rewards.server import serve_forever

    names = [item.strip() for item in reward.split(",") if item.strip()]
    scorers = rewards.load(names, by_name(path, "--path", "FOLDER"), device, dtype)
    personal = [backend.name for backend in scorers.backends if backend.reads_user]
    if personal:
        raise RewardError(f"requests name no user, so serve one user of {personal[0]}: {personal[0]}#NAME")
    serve_forever(scorers, host=host, port=port, announce=typer.echo)
    return 0
