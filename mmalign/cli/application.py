"""The application: the root command, its exit codes, and which commands there are in which order."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Annotated

import typer

from mmalign import __version__
from mmalign.cli import experiments, listing
from mmalign.cli.groups import CommandGroup
from mmalign.cli.hints import setting_hint
from mmalign.cli.outcome import DEBUG_VARIABLE, conclude

# Modules of this package that bring commands of their own by `register(app)`.
_PARTS = (
    "compare", "score", "rewards", "data", "generate", "annotate", "arena", "personalize", "evaluate_guard", "evaluate_video",
)  # fmt: skip

_HELP = """Align text-to-image and vision-language models with preferences.

A first look, without downloads:  mmalign demo
"""
_EPILOG = """\b
An experiment is a YAML file; any of its settings can be changed behind it:
  mmalign check configs/tiny/diffusion_dpo.yaml optim.lr=1e-4
  mmalign train configs/tiny/diffusion_dpo.yaml optim.lr=1e-4
`mmalign COMMAND --help` says more about each command.

\b
Exit codes: 0 done; 2 something you can mend; 3 done, but some rows failed;
1 a fault of ours; 130 interrupted.
"""


class Root(CommandGroup):
    """Gives every command the same endings, and takes ``--debug`` before or after the command."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(word for word in args[:end] if word != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> None:  # type: ignore[override]
        def work() -> object:
            try:
                return super(Root, self).invoke(ctx)
            except typer.TyperException as error:
                raise _with_hint(error) from error.__cause__

        code = conclude(
            work,
            debug=bool(ctx.params.get("debug")),
            passing=(typer.TyperException, typer.Exit, typer.Abort),
        )
        raise typer.Exit(code)


def _with_hint(error: typer.TyperException) -> typer.TyperException:
    """The same error; where a setting was written as an option, with how it is written here."""
    option, where = getattr(error, "option_name", None), getattr(error, "ctx", None)
    near = getattr(error, "possibilities", None)
    if option and not near and where is not None and any(parameter.name == "overrides" for parameter in where.command.params):
        error.message = f"{error.message}. {setting_hint(option)}"
    return error


app = typer.Typer(
    name="mmalign",
    cls=Root,
    help=_HELP,
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich takes longer to import than the rest of the help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mmalign {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG_VARIABLE, help="Show tracebacks; works behind any command too.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _assemble() -> None:
    experiments.register(app)
    for part in _PARTS:
        name = f"mmalign.cli.{part}"
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name).register(app)
    listing.register(app)


_assemble()


def main() -> None:
    """Entry point of the console script ``mmalign``."""
    # A method of the user's own (`name: package.module:Class`) may lie in the working directory. Last, so that no file
    # there can stand in front of an installed library.
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    app(prog_name="mmalign")
