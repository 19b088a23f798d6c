"""The commands: what is offered, what help costs, and that each reaches what it names."""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mmalign.cli
from mmalign.cli import app, train_script
from mmalign.cli.experiments import _ending
from mmalign.cli.listing import table

COMMANDS = [
    "demo", "train", "check", "explain", "evaluate", "evaluate-guard", "evaluate-video", "compare", "report", "export", "schema",
    "list", "personalize",
]  # fmt: skip
HEAVY = ("torch", "diffusers", "transformers", "pydantic", "numpy", "rich", "yaml", "PIL", "datasets", "pyarrow")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmalign.cli", *arguments], capture_output=True, text=True, check=False
    )


def names_in_help() -> list[str]:
    text = CliRunner().invoke(app, ["--help"]).stdout.split("Commands:\n")[1].split("\n\n")[0]
    return [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line[2] != " "]


def test_the_commands_offered_are_those_that_work() -> None:
    offered = names_in_help()
    parts = Path(mmalign.cli.__file__).parent
    more = ("score", "score-eval", "rewards", "data", "annotate", "arena", "generate")
    there = [name for name in more if (parts / f"{name.split('-')[0]}.py").exists()]
    assert sorted(offered) == sorted([*COMMANDS, *there, "users"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert f" {command} " in done.stdout.splitlines()[0]
    usage, _, rest = done.stdout.lstrip().partition("\n\n")  # the usage may take more than one line
    assert usage.lstrip().startswith("Usage:")
    assert len(rest.lstrip("\n").splitlines()[0]) > len("  A sentence."), "the first line says what it does"


@pytest.mark.parametrize("group", [[], ["data"], ["rewards"], ["users"]])
def test_lists_of_commands_cut_no_sentence_off(group: list[str]) -> None:
    listed = CliRunner().invoke(app, [*group, "--help"]).stdout.split("Commands:\n")[1].split("\n\n")[0]
    assert "..." not in listed and listed.rstrip().endswith(".")


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom mmalign.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )

    def processor_seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = processor_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    # Processor time: the wall clock of a busy machine says nothing about us.
    assert processor_seconds() - before < 0.7


def test_no_arguments_show_the_help_and_the_version_is_known() -> None:
    assert "Commands:" in CliRunner().invoke(app, []).output
    assert CliRunner().invoke(app, ["--version"]).stdout == f"mmalign {mmalign.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "x.yaml", "--resum"], "No such option: --resum"),
        (["train", "x.yaml", "--optim.lr", "3"], "written without dashes, behind it: optim.lr=VALUE"),
        (["check", "x.yaml", "--learning_rate=3"], "written without dashes, behind it: optim.lr=VALUE"),
        (["train"], "Missing argument 'CONFIG'"),
        (["list", "method"], "'methods'"),
        (["export", "runs/x", "--format", "ckpt", "--out", "y"], "'diffusers'"),
    ],
)
def test_wrong_usage_is_2_with_a_hint(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize("command", ["train", "check", "explain"])
def test_a_missing_experiment_is_one_message(command: str, tmp_path: Path) -> None:
    (tmp_path / "sd15.yaml").write_text("")
    done = CliRunner().invoke(app, [command, str(tmp_path / "sd51.yaml")])
    assert done.exit_code == 2
    assert f"did you mean '{tmp_path / 'sd15.yaml'}'?" in done.stderr
    assert "Traceback" not in done.output


def test_a_mistyped_setting_ends_the_process_with_2(tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text("method: {name: diffusion_dpo, betta: 5000}\noptim: {lr: fast}\n")
    done = run("check", str(path), "tuning.name=lorra")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "method.betta: not a setting of diffusion_dpo; did you mean 'beta'?" in done.stderr
    assert "optim.lr: expected a number, got 'fast'" in done.stderr
    assert "did you mean 'lora'? (set on the command line)" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_schema_is_json_with_every_method() -> None:
    from mmalign.trainers import METHODS

    done = CliRunner().invoke(app, ["schema"])
    assert done.exit_code == 0
    branches = json.loads(done.stdout)["properties"]["method"]["oneOf"]
    assert [branch["title"] for branch in branches][: len(METHODS.names())] == METHODS.names()


@pytest.mark.parametrize(
    ("what", "module", "name"),
    [
        ("methods", "mmalign.trainers", "METHODS"),
        ("objectives", "mmalign.objectives", "OBJECTIVES"),
        ("models", "mmalign.models.table", "MODELS"),
        ("formats", "mmalign.data", "FORMATS"),
    ],
)
def test_list_names_every_entry(what: str, module: str, name: str) -> None:
    registry = getattr(importlib.import_module(module), name)
    done = CliRunner().invoke(app, ["list", what])
    assert done.exit_code == 0
    starts = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert starts == registry.names()


def test_the_table_is_aligned_and_wraps() -> None:
    rows = [("dpo", "logistic loss on the implicit reward margin", "arXiv:2305.18290"), ("kto", "unpaired", "")]
    assert table(rows, width=60).splitlines() == [
        "dpo  logistic loss on the implicit reward   arXiv:2305.18290",
        "     margin",
        "kto  unpaired",
    ]
    assert table([], width=60) == ""


def test_what_is_said_after_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.experiment import RunResult

    win = {"mean": 0.712, "low": 0.65, "high": 0.7713, "reward": "oracle"}
    (tmp_path / "report.html").write_text("")
    result = RunResult(folder=tmp_path, metrics={}, summary={"win_rate": win, "warnings": ["few prompts"]})
    assert _ending(result) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "win rate against the base by oracle: 71.2% (95 % interval 65.0% to 77.1%)",
        f"run folder: {tmp_path}",
        f"report: {tmp_path / 'report.html'}",
    ]
    assert said.err == "warning: few prompts\n"
    monkeypatch.setenv("RANK", "1")
    assert _ending(result) == 0
    assert capsys.readouterr().out == "", "one process speaks for all"
    assert _ending(RunResult(folder=tmp_path, metrics={}, summary={}, interrupted=True)) == 130


@pytest.mark.parametrize(
    "arguments", [["--config", "CONFIG"], ["optim.lr=1", "--config", "CONFIG", "--resume", "run.seed=3"]]
)
def test_a_script_refuses_a_file_for_another_method(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text("method: {name: diffusion_sft}\n")
    with pytest.raises(SystemExit) as end:
        train_script("diffusion_dpo", [word.replace("CONFIG", str(path)) for word in arguments])
    assert end.value.code == 2
    assert "this script trains 'diffusion_dpo', the file is for 'diffusion_sft'" in capsys.readouterr().err


def test_a_script_reports_problems_like_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text("method: {name: diffusion_dpo, betta: 1}\n")
    with pytest.raises(SystemExit) as end:
        train_script("diffusion_dpo", ["--config", str(path), "optim.stps=3"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "method.betta: not a setting of diffusion_dpo; did you mean 'beta'?" in said
    assert "optim.stps: not a setting of optim; did you mean 'steps'? (set on the command line)" in said


@pytest.mark.parametrize("arguments", [[], ["--config"], ["--config", "x", "--learning_rate", "3"]])
def test_a_script_used_wrongly_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        train_script("diffusion_dpo", arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "usage: train_diffusion_dpo.py" in said
    assert ("written without dashes, behind it: optim.lr=VALUE" in said) == ("--learning_rate" in arguments)


def test_a_reader_that_goes_away_is_no_fault() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mmalign.cli", "list", "methods"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=60)
