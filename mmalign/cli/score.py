"""`mmalign score` and `mmalign score-eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmalign.cli.engine import Engine, Gpus
from mmalign.cli.naming import by_name
from mmalign.cli.pictures import (
    Alpha,
    Clip,
    Decode,
    DecodeWorkers,
    Exif,
    FastPreprocess,
    Workers,
    colours,
    decoding_processes,
)

if TYPE_CHECKING:
    from mmalign.scoring.output import Report

_COMMA = "comma-separated"
PROMPT_FLAGS = ("empty_prompt", "special_token")
Revisions = Annotated[
    list[str] | None,
    typer.Option(help="NAME=REVISION: branch, tag or commit of a reward's published weights; may be repeated."),
]
USER_FLAGS = ("no_user", "unknown_user")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("score")(score)
    app.command("score-eval")(score_eval)


def score(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Image folder, .parquet, .jsonl, .csv or datasets folder.")
    ],
    reward: Annotated[str, typer.Option(help=f"Reward names, {_COMMA}; see 'mmalign rewards list'.")],
    out: Annotated[Path, typer.Option(help="Table to write: .parquet, .csv or .jsonl.")] = Path("scores.parquet"),
    path: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER: local weights of a reward; may be repeated.")
    ] = None,
    revision: Revisions = None,
    image_col: Annotated[str, typer.Option(help=f"Image columns, {_COMMA}.")] = "",
    prompt_col: Annotated[str | None, typer.Option(help="Prompt column.")] = None,
    key_col: Annotated[str | None, typer.Option(help="Column that names rows.")] = None,
    user_col: Annotated[
        str | None, typer.Option(help="Column with users, for rewards that differ between people; 'user' by default.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="One user for all images.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all images.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="For a folder: JSON that maps file names to prompts; its prompts.json by default."),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that paths in a table may not leave.")] = None,
    batch_size: Annotated[str, typer.Option(help="Images per forward; 'auto' follows the device's memory.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of encoders: fp32, bf16, fp16.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine; with --engine ray, workers.")] = 1,
    engine: Engine = "local",
    gpus: Gpus = None,
    workers: Workers = None,
    decode_workers: DecodeWorkers = None,
    decode: Decode = "full",
    fast_preprocess: FastPreprocess = False,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=win_rate|votes|zscore_group|... or NAME=FILE.toml: a combined column; may be repeated."
        ),
    ] = None,
    embeddings: Annotated[Path | None, typer.Option(help="Also write image embeddings to this .parquet file.")] = None,
    precision_check: Annotated[
        int,
        typer.Option(min=0, help="First score this many rows in fp32 too, and stop if --dtype moves scores too far."),
    ] = 0,
    alpha: Alpha = "white",
    exif: Exif = True,
    clip: Clip = False,
    compile: Annotated[bool, typer.Option("--compile", help="Run image encoders through torch.compile.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first rows.")] = None,
    resume: Annotated[bool, typer.Option(help="Reuse finished parts of an earlier run.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 if any row failed or a prompt is empty.")] = False,
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Never download.")] = False,
) -> int:
    """Score images against their prompts; one row per input row, one column per reward. Resumes where it stopped."""
    from mmalign.rewards.reading import default_workers
    from mmalign.scoring.ensembles import parse_ensemble
    from mmalign.scoring.job import Job
    from mmalign.scoring.run import timed
    from mmalign.scoring.sources import Columns

    names = _split(reward)
    paths = by_name(path, "--path", "FOLDER")
    revisions = _revisions(revision, names, paths)
    decode_workers = decoding_processes(processes, decode_workers, engine)
    columns = Columns(images=_split(image_col), prompt=prompt_col, key=key_col, fixed_prompt=prompt, user=user_col,
                      fixed_user=user, prompt_file=str(prompt_file) if prompt_file else None)  # fmt: skip
    job = Job(
        input=str(source), rewards=names, out=str(out), paths=paths, revisions=revisions, columns=columns,
        root=str(root) if root else None, limit=limit, batch_size=_batch_size(batch_size), device=device, dtype=dtype,
        workers=workers or max(1, default_workers() // processes), resume=resume, compile=compile,
        local_files_only=local_files_only,
        ensembles=tuple(parse_ensemble(item) for item in ensemble or []), precision_check=precision_check,
        embeddings=str(embeddings) if embeddings else None, colours=colours(alpha, exif, clip),
        decode_workers=decode_workers, decode=decode, fast_preprocess=fast_preprocess,
    )  # fmt: skip
    with _Bar() as bar:
        report, seconds = timed(job, processes=processes, command=" ".join(sys.argv), progress=bar,
                                engine=engine, gpus=gpus)  # fmt: skip
    return 0 if report is None else _close(report, out, seconds, strict)


def _close(report: Report, out: Path, seconds: float, strict: bool) -> int:
    """Show the report; the exit code that follows from it."""
    _show(report, out, seconds)
    if strict and (report.failed or report.converted.get("empty_prompt")):
        return 2
    return 3 if report.failed else 0


def _revisions(items: list[str] | None, names: tuple[str, ...], paths: dict[str, str]) -> dict[str, str]:
    from mmalign.errors import DataError

    revisions = by_name(items, "--revision", "REVISION")
    for name in revisions:
        if name not in names or name in paths:
            why = "its weights are local (--path)" if name in paths else f"--reward lists {', '.join(names)}"
            raise DataError(f"--revision {name}={revisions[name]}: {why}")
    return revisions


def score_eval(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Scored pairs: .parquet, .csv or .jsonl.")],
    reward: Annotated[str, typer.Option(help=f"Reward names, {_COMMA}.")],
    labels: Annotated[str, typer.Option(help="Columns with the labels of both sides.")] = "label_0,label_1",
    image_col: Annotated[str, typer.Option(help="The two image columns that were scored.")] = "jpg_0,jpg_1",
    rule: Annotated[str, typer.Option(help="pickapic, imagereward, hpdv2 or no-ties.")] = "no-ties",
    threshold: Annotated[float, typer.Option(min=0.0, help="Tie threshold on probabilities, for pickapic.")] = 0.0,
    labels_from: Annotated[Path | None, typer.Option(help="Table with the labels, row for row, if elsewhere.")] = None,
) -> int:
    """Pairwise accuracy of scored rewards against human labels, with the tie rule named."""
    from mmalign.scoring.evaluate import evaluate_table

    sides, label_names = _split(image_col), _split(labels)
    for name, value in evaluate_table(
        table, _split(reward), sides=sides, labels=label_names, rule=rule, threshold=threshold, labels_from=labels_from
    ).items():
        typer.echo(
            f"{name}: accuracy {value.accuracy:.4f} on {value.pairs} pairs ({value.missing} without a score left out)"
        )
    typer.echo(f"rule: {rule}")
    return 0


class _Bar:
    """A progress bar on a terminal; one line per tenth elsewhere."""

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("scoring", total=None, rate="")
        self._progress.start()
        return self

    def __call__(self, done: int, total: int) -> None:
        task = self._progress.tasks[0]
        rate = f"{done / task.elapsed:.1f} rows/s" if task.elapsed else ""
        self._progress.update(self._task, completed=done, total=total, rate=rate)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _show(report: Report, out: Path, seconds: float) -> None:
    from mmalign import rewards

    rate = f", {report.rows / seconds:.1f} rows/s" if seconds > 0 else ""
    waited = f", {100 * min(1.0, report.decode_wait / seconds):.0f} % of it waiting for pictures" if seconds > 0 else ""
    typer.echo(f"{report.rows} rows in {seconds:.1f} s{rate}{waited} -> {out}")
    for title, numbers in report.rewards.items():
        if "mean" in numbers:
            typer.echo(
                f"  {title}: mean {numbers['mean']:.4f}, 5/50/95 % "
                f"{numbers['q05']:.4f} / {numbers['q50']:.4f} / {numbers['q95']:.4f} ({numbers['count']:.0f} scored)"
            )
        else:
            typer.echo(f"  {title}: nothing scored")
    names = {title.partition("__")[0] for title in report.rewards}
    apart = sorted(n for n in names if n in rewards.CARDS and not rewards.CARDS[n].comparable_across_prompts)
    if "hpsv2" in names:
        typer.echo("  note: hpsv2 is hpsv2.1; the older version is called hpsv2.0, and the two are not comparable")
    if apart:
        typer.echo(f"  note: {', '.join(apart)}: compare scores of one prompt only")
    for name, found in report.checks.items():
        typer.echo(
            f"  precision of {name}: differs from fp32 by at most {found['max_difference']:.2g}, "
            f"order kept in {100 * found['order_agreement']:.1f} % of clear pairs ({found['rows']} rows)"
        )
    for name, found in report.ensembles.items():
        soft = found.get("soft_labels")
        note = f", soft labels at temperature {soft['temperature']:.4g}" if soft else ""
        typer.echo(f"  ensemble {name}: {found['method']} of {', '.join(found['weights'])}{note}")
    if report.truncated:
        typer.echo(f"  prompts longer than the text encoder reads: {report.truncated}")
    kinds = dict.fromkeys(PROMPT_FLAGS, "prompts") | dict.fromkeys(USER_FLAGS, "users")
    for title in ("pictures", "prompts", "users"):
        found = {
            flag: count for flag, count in sorted(report.converted.items()) if kinds.get(flag, "pictures") == title
        }
        if found:
            typer.echo(f"  {title}: " + ", ".join(f"{flag} {count}" for flag, count in found.items()))
    if report.failed:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(report.reasons.items()))
        typer.echo(f"  failed rows: {report.failed} ({reasons}); see the columns status and error")


def _batch_size(text: str) -> int | None:
    from mmalign.errors import DataError

    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise DataError(f"--batch-size {text}: expected a number from 1, or auto")
    return int(text)


def _split(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())
