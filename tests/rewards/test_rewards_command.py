"""`mmalign rewards`: list, show, verify, convert, fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmalign import rewards
from mmalign.cli.application import app


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["rewards", *arguments])


def test_list_names_every_reward_and_what_is_missing() -> None:
    done = run("list")
    assert done.exit_code == 0
    lines = {line.split()[0]: line for line in done.output.splitlines()}
    assert set(lines) == set(rewards.list())
    assert "not available: its reference forward" in lines["hpsv3"] and "not available" not in lines["pickscore"]


def test_show_prints_the_card() -> None:
    done = run("show", "pickscore")
    assert done.exit_code == 0
    for line in ("formula: exp(logit_scale) * cos", "weights: yuvalkirstain/PickScore_v1", "cite: arXiv:2305.01569",
                 "memory of the weights: 3.94 GB in fp32, 1.97 GB in bf16"):  # fmt: skip
        assert line in done.output
    wrong = run("show", "pikscore")
    assert wrong.exit_code == 2 and "did you mean 'pickscore'" in wrong.output


def test_every_card_says_what_a_user_must_know() -> None:
    for name in rewards.list():
        card = rewards.card(name)
        assert card.name == name and card.summary and card.formula and card.nominal_range and card.higher_is_better


def test_verify_prints_the_identity_of_the_weights(clip_folder: Path) -> None:
    done = run("verify", "pickscore", "--path", str(clip_folder))
    backend = rewards.load_backend("pickscore", clip_folder, "cpu", "fp32")
    assert done.exit_code == 0 and f"weights: {backend.record()['weights']}" in done.output
    assert "preprocess: clip_hf:32" in done.output


def test_convert(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3.0)}, tmp_path / "a.pt")
    done = run("convert", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors"))
    assert done.exit_code == 0 and "1 tensors" in done.output
    assert load_file(tmp_path / "a.safetensors")["w"].tolist() == [0.0, 1.0, 2.0]
    assert run("convert", str(tmp_path / "a.pt"), str(tmp_path / "a.bin")).exit_code == 2
    assert run("convert", "mps", str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors")).exit_code == 0
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert "expected FILE and OUT, got 1" in run("convert", "a.pt").output


@pytest.mark.parametrize(("path", "words"), [("tiny-clop=/x", "did you mean 'tiny-clip'"), ("/x", "expected NAME=FOLDER")])
def test_a_mistyped_path_is_not_left_aside(path: str, words: str) -> None:
    done = run("serve", "--reward", "tiny-clip", "--port", "0", "--path", path)
    assert done.exit_code == 2 and words in done.output


def test_weights_that_cannot_be_fetched_say_how_to_use_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run("fetch", "pickscore")
    assert done.exit_code == 2 and "cannot get 'yuvalkirstain/PickScore_v1' (about 3.9 GB)" in done.output
    assert "path='/folder'" in done.output


@pytest.mark.parametrize(("device", "words"), [("cuda:99", "there is no device 'cuda:99'"), ("gpu", "'gpu' is no device")])
def test_a_device_that_is_not_there_is_named(device: str, words: str) -> None:
    done = run("serve", "--reward", "tiny-clip", "--port", "0", "--device", device)
    assert done.exit_code == 2 and words in done.output
