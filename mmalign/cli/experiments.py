"""Commands about experiments and their runs. Each imports what it calls when it is called."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmalign.cli.outcome import INTERRUPTED

if TYPE_CHECKING:
    from mmalign.experiment import RunResult

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="An experiment file (YAML), e.g. configs/tiny/diffusion_dpo.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings to change, e.g. optim.lr=1e-4 run.name=trial.", show_default=False
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, e.g. runs/demo.")]


def register(app: typer.Typer) -> None:
    """Add the commands in the order in which a newcomer meets them."""
    for command in (demo, train, check, explain, evaluate, report, export, schema):
        app.command()(command)


def demo(
    out: Annotated[
        Path, typer.Option(help="Run folder to write; an earlier demo there is kept under another name.")
    ] = Path("runs/demo"),
    method: Annotated[
        str, typer.Option(metavar="NAME", help="Which method to show; see `mmalign list methods`.")
    ] = "diffusion_dpo",
    seed: Annotated[int, typer.Option(help="Seed of training and evaluation.")] = 0,
) -> int:
    """Align a tiny embedded model on this machine, without downloads.

    Labels pairs of pictures with an embedded reward, trains on them, compares the result with the model it started
    from on prompts neither has seen, and writes a run folder with a page to look at (report.html). Takes a few minutes
    on two processor cores.
    """
    from mmalign.demo import demo as run_demo

    result = run_demo(out, method, seed)
    return _ending(result, headline=False)


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")] = False,
) -> int:
    """Run an experiment and write its run folder.

    On several processes or GPUs start the script of the method instead:
    accelerate launch scripts/train_METHOD.py --config CONFIG [KEY=VALUE]...
    """
    return train_and_tell(config, overrides or [], resume=resume)


def train_and_tell(config: str, overrides: list[str], *, resume: bool) -> int:
    """Train, print what came of it, and return the exit code."""
    from mmalign.experiment import train as run_training

    result = run_training(config, overrides, resume)
    return _ending(result)


def check(config: Config, overrides: Overrides = None) -> None:
    """Check an experiment file and estimate its cost.

    Loads no weights. Reports all problems at once, with the nearest names for mistyped settings; then the number of
    parameters, the memory and the cost of a step.
    """
    from mmalign.experiment import check as run_check

    typer.echo(run_check(config, overrides or []))


def explain(config: Config, overrides: Overrides = None) -> None:
    """Show every value in force and the file each came from."""
    from mmalign.experiment import explain as run_explain

    typer.echo(run_explain(config, overrides or []))


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN|CONFIG", help="A run folder, or an experiment file.")],
    overrides: Overrides = None,
) -> None:
    """Compare the aligned model with its base on equal seeds.

    Prints reward differences and win rates with 95 % intervals, per reward and per prompt group. For an experiment
    file nothing is trained: the model that it starts from is evaluated.
    """
    from mmalign.evaluation import evaluate as run_evaluation

    typer.echo(run_evaluation(Path(run), overrides or []))


def report(run: Run) -> None:
    """Build the page of a run (report.html) again."""
    from mmalign.report import build_report

    typer.echo(build_report(Path(run)))


def export(
    run: Run,
    format: Annotated[
        Literal["diffusers", "peft", "kohya", "transformers"],
        typer.Option(
            help="diffusers: a pipeline folder; peft: a LoRA adapter folder; kohya: one LoRA file; transformers: a "
            "vision-language model folder."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; must be empty or absent.")],
) -> None:
    """Write the trained weights for other tools to load."""
    from mmalign.export import export_run

    typer.echo(export_run(Path(run), format, out))


def schema() -> None:
    """Print the JSON Schema of experiment files, for editors.

    Save it (mmalign schema > mmalign.schema.json) and name it in the first line of an experiment file:
    # yaml-language-server: $schema=mmalign.schema.json
    """
    from mmalign.experiment import schema as make_schema

    typer.echo(json.dumps(make_schema(), indent=2, ensure_ascii=False))


def _ending(result: RunResult, *, headline: bool = True) -> int:
    """Say where the run is and what came of it; on the first process only."""
    if result.interrupted:
        typer.echo(f"interrupted; the newest checkpoint is in {result.folder}, --resume continues from it", err=True)
        return INTERRUPTED
    if os.environ.get("RANK", "0") != "0":
        return 0
    for warning in result.summary.get("warnings") or ():
        typer.echo(f"warning: {warning}", err=True)
    notice = result.summary.get("notice")
    if notice:
        typer.echo(str(notice))
    win = result.summary.get("win_rate")
    if headline and isinstance(win, Mapping):
        mean, low, high = (f"{win[name]:.1%}" for name in ("mean", "low", "high"))
        typer.echo(f"win rate against the base by {win['reward']}: {mean} (95 % interval {low} to {high})")
    typer.echo(f"run folder: {result.folder}")
    page = result.folder / "report.html"
    if headline and page.exists():
        typer.echo(f"report: {page}")
    return 0
