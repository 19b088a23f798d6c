"""Whatever a person can get wrong: one message that names file, key or row and the remedy, exit 2, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmalign.cli import app
from mmalign.cli.application import main
from tests.forks import start
from tests.invariants.conftest import CONFIG, settings, write_pairs


@pytest.fixture
def own_pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs", 8)


def refused(*arguments: str, says: tuple[str, ...]) -> str:
    """Give the command line words that it must refuse, in this process; returns its message."""
    done = CliRunner().invoke(app, list(arguments))
    return message_of(done.exit_code, done.stdout, done.stderr, says)


def message_of(code: int, stdout: str, stderr: str, says: tuple[str, ...]) -> str:
    assert code == 2, f"exit {code}\n{stdout}\n{stderr}"
    assert "Traceback" not in stderr
    for text in says:
        assert text in stderr, f"'{text}' is missing in:\n{stderr}"
    return stderr


def test_all_problems_of_a_file_in_one_message(own_pairs: Path, tmp_path: Path) -> None:
    refused(
        "train", CONFIG, *settings(own_pairs, tmp_path / "run"), "method.betta=1", "optim.lr=fast", "run.sead=1",
        says=("3 problems", "method.betta", "did you mean 'beta'", "optim.lr", "'fast'", "did you mean 'seed'"),
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_missing_files(own_pairs: Path, tmp_path: Path) -> None:
    refused("train", str(tmp_path / "no.yaml"), says=("no.yaml",))
    refused("train", CONFIG, *settings(tmp_path / "nowhere", tmp_path / "run"), says=("nowhere",))
    refused("check", CONFIG, *settings(tmp_path / "nowhere", tmp_path / "run"), says=("data.manifest", "mmalign data import"))
    refused(
        "train", CONFIG, *settings(own_pairs, tmp_path / "run"), f"model.path={tmp_path / 'no-model'}",
        says=("model.path", "no-model"),
    )  # fmt: skip


def test_missing_column(own_pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in own_pairs.read_text().splitlines()]
    own_pairs.write_text("\n".join(json.dumps({("promt" if k == "prompt" else k): v for k, v in row.items()}) for row in rows))
    refused("train", CONFIG, *settings(own_pairs, tmp_path / "run"), says=("pairs.jsonl", "prompt", "promt"))


def test_corrupt_image_is_quarantined_and_too_many_stop_the_run(
    own_pairs: Path, tmp_path: Path, train: Callable[..., Path]
) -> None:
    picture = own_pairs.parent / "3-rejected.png"
    picture.write_bytes(picture.read_bytes()[:60])
    refused(
        "train", CONFIG, *settings(own_pairs, tmp_path / "strict", data__max_bad_fraction=0.01),
        says=("truncated_image", "max_bad_fraction"),
    )  # fmt: skip
    run = train(tmp_path / "run", pairs=own_pairs, optim__steps=2)
    refused_rows = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["id"], row["reason"]) for row in refused_rows] == [("row-3", "truncated_image")]
    assert json.loads((run / "summary.json").read_text())["samples_quarantined"] == 1
    assert picture.exists()


def test_all_ties(own_pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"p_chosen": 0.5} for line in own_pairs.read_text().splitlines()]
    own_pairs.write_text("\n".join(json.dumps(row) for row in rows))
    refused("train", CONFIG, *settings(own_pairs, tmp_path / "run"), says=("tie", "soft"))


def test_a_loss_that_is_not_finite(own_pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    message = refused(
        "train", CONFIG, *settings(own_pairs, out, optim__lr=1e18, optim__warmup_steps=0, optim__ema_decay=0.0),
        says=("not finite", "optim.lr", "has not moved"),
    )  # fmt: skip
    saved = sorted((out / "checkpoints").iterdir())
    assert saved[-1].name in message


def on_a_full_disk(arguments: list[str], told: str) -> None:
    """The command in a process that may write no file of more than 200 kB; what it says goes to a file."""
    with open(told, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    sys.argv = ["mmalign", *arguments]
    main()


def test_full_disk_while_saving(own_pairs: Path, tmp_path: Path, train: Callable[..., Path]) -> None:
    out = tmp_path / "run"
    # Build the caches first, so that only the checkpoint is too large for the limit.
    train(tmp_path / "warm", pairs=own_pairs, optim__steps=1)
    told = tmp_path / "told"
    process = start(on_a_full_disk, ["train", CONFIG, *settings(own_pairs, out)], str(told))
    process.join()
    assert process.exitcode is not None
    message_of(process.exitcode, "", told.read_text(), ("cannot write", "step-00000002", "Free space"))
    assert list((out / "checkpoints").iterdir()) == []


def test_an_output_folder_that_cannot_be_written(own_pairs: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    refused("train", CONFIG, *settings(own_pairs, blocker / "run"), says=("run.out", "file/run"))


def test_a_resume_on_changed_data(own_pairs: Path, tmp_path: Path, train: Callable[..., Path]) -> None:
    out = train(tmp_path / "run", pairs=own_pairs, optim__steps=2)
    lines = own_pairs.read_text().splitlines()
    own_pairs.write_text("\n".join(lines[:-1]) + "\n")
    refused(
        "train", CONFIG, *settings(own_pairs, out, optim__steps=4), "--resume", says=("data.manifest", "changed since"),
    )  # fmt: skip


def test_a_resume_with_other_settings(own_pairs: Path, tmp_path: Path, train: Callable[..., Path]) -> None:
    out = train(tmp_path / "run", pairs=own_pairs, optim__steps=2)
    before = (out / "config.yaml").read_text()
    again = ["train", CONFIG, *settings(own_pairs, out, optim__steps=4), "--resume"]
    refused(*again, "method.beta=7", "run.seed=8", says=("method.beta: ", "and 7.0 now", "run.seed: ", "another run.name"))
    refused(*again, "method.name=diffusion_kto", says=("method.name: 'diffusion_dpo' when", "'diffusion_kto' now"))
    refused(*again, "optim.batch_size=3", says=("optim.batch_size: a step had", "batch_size x accumulate x processes"))
    refused(*again, "optim.steps=1", says=("optim.steps: the run is at step 2 already",))
    assert (out / "config.yaml").read_text() == before


def test_wrong_combinations(own_pairs: Path, tmp_path: Path) -> None:
    base = ["check", CONFIG, *settings(own_pairs, tmp_path / "run")]
    refused(*base, "tuning.name=full", "reference.name=adapter_off", says=("reference.name", "tuning.name=lora"))
    refused(*base, "method.objective=ipo", "method.label_smoothing=0.1", says=("label_smoothing", "ipo"))
    refused(*base, "model.attention=xformer", says=("model.attention", "xformers"))


def test_xformers_on_a_cpu_is_refused_with_the_remedy(own_pairs: Path, tmp_path: Path) -> None:
    refused(
        "train", CONFIG, *settings(own_pairs, tmp_path / "run"), "model.attention=xformers", "run.device=cpu",
        says=("model.attention: xformers",),
    )  # fmt: skip


def test_export_into_a_full_folder(own_pairs: Path, tmp_path: Path, train: Callable[..., Path]) -> None:
    run = train(tmp_path / "run", pairs=own_pairs, optim__steps=2)
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    refused("export", str(run), "--format", "diffusers", "--out", str(target), says=("--out", "not empty"))
    assert (target / "mine.txt").read_text() == "keep"
    shutil.rmtree(target)
