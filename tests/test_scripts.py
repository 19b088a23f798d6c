"""The method scripts: one for each method, a dozen lines, refusing what belongs to another method."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmalign.trainers import METHODS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("train_*.py"))
NAMES = [path.stem.removeprefix("train_") for path in SCRIPTS]


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a script as the interpreter would, in this process: one of its own takes longer than all that is looked at here."""

    def start(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(script), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        said = capsys.readouterr()
        return subprocess.CompletedProcess(command, int(end.value.code or 0), said.out, said.err)

    return start


def test_every_method_has_a_script_and_every_script_a_method() -> None:
    assert sorted(NAMES) == sorted(METHODS.names())


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_a_script_is_a_docstring_and_a_call(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert text.count("\n") <= 15
    tree = ast.parse(text)
    words = ast.get_docstring(tree) or ""
    assert "arXiv:" in words or "github.com/" in words, "the paper, or the code where there is none"
    assert f"scripts/{script.name} --config configs/" in words
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert calls == [f"train_script(method='{script.stem.removeprefix('train_')}')"]


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_help_names_the_method_and_an_example(run: Run, script: Path) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"Train with the method {script.stem.removeprefix('train_')}." in done.stdout
    assert "--config PATH" in done.stdout
    assert "--resume" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_an_experiment_of_another_method_is_refused(run: Run, script: Path) -> None:
    own = script.stem.removeprefix("train_")
    other = next(name for name in NAMES if name != own)
    file = f"configs/tiny/{other}.yaml"
    done = run(script, "--config", file)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"method.name: this script trains '{own}', the file is for '{other}'" in done.stderr
    assert file in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistyped_setting_is_refused_with_the_nearest_name(run: Run) -> None:
    done = run(SCRIPTS[0], "--config", f"configs/tiny/{NAMES[0]}.yaml", "optim.learning_rates=1", "run.nmae=x")
    assert done.returncode == 2
    assert "2 problems" in done.stderr
    assert "run.nmae: not a setting of run; did you mean 'name'?" in done.stderr
    assert "optim.learning_rates" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_is_named_by_a_process_of_its_own() -> None:
    command = [sys.executable, str(SCRIPTS[0]), "--config", "configs/tiny/diffusion_dop.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert "configs/tiny/diffusion_dop.yaml: no such file; did you mean" in done.stderr
