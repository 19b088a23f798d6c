"""Mask learning through the one loop on the embedded model: ratio, turns, determinism, kill and resume, two processes.

MMALIGN_KILLS says how often learning is killed (by default once in a checkpoint and once in a step).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest

from mmalign.errors import ConfigError
from mmalign.experiment import load_experiment
from mmalign.freezing import FreezeMask
from mmalign.trainers.freeze_as_guard import FreezeAsGuard, FreezeAsGuardConfig
from tests.forks import kill_when, launched, start
from tests.freezing.guarded import GUARD, learn
from tests.invariants.conftest import metric_lines

KILLS = max(2, int(os.environ.get("MMALIGN_KILLS", "2")))


def policy_files(folder: Path, step: int) -> dict[str, bytes]:
    names = ("policy", "optimizer")
    at = folder / "checkpoints" / f"step-{step:08d}"
    return {f"{name}{suffix}": (at / f"{name}{suffix}").read_bytes() for name in names for suffix in (".json", ".safetensors")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(tmp_path_factory.mktemp("guard") / "straight")


def test_the_artefact(straight: Path) -> None:
    mask = FreezeMask.load(straight / "export")
    assert len(mask.tensors) == 286 and len(mask.frozen) == round(0.3 * 286) == 86
    assert mask.recipe["seed"] == 0 and mask.recipe["steps"] == 10 and mask.recipe["candidates"] == 286
    assert mask.recipe["domains"] == {"illegal": ["ann", "bob", "cai", "dov"], "innocent": ["dots", "rows", "slant"]}
    assert mask.base["component"] == "unet" and mask.base["class"] == "UNet2DConditionModel"
    assert 0 <= mask.recipe["overlap_with_start"] < 0.6
    highest = sorted((entry.score for entry in mask.tensors.values()), reverse=True)
    assert {mask.tensors[name].score >= highest[85] for name in mask.frozen} == {True}
    for name in ("mask_by_block", "mask_by_kind"):
        figure = (straight / "export" / f"{name}.svg").read_text()
        width = int(re.search(r'width="(\d+)"', figure)[1])  # type: ignore[index]
        labels = re.findall(r'<text x="(\d+)"[^>]*fill="#555">([^<]*)<', figure)
        assert labels and all(int(x) + 7 * len(words) <= width for x, words in labels), "labels are not cut"
        assert figure.startswith("<svg") and "86 of 286 tensors frozen (30.1 %)" in figure
    assert "up 1" in (straight / "export" / "mask_by_block.svg").read_text()
    assert "cross-attention" in (straight / "export" / "mask_by_kind.svg").read_text()
    assert (straight / "report.html").is_file()


def test_turns_are_a_function_of_the_step() -> None:
    trainer = FreezeAsGuard.__new__(FreezeAsGuard)
    trainer.config = FreezeAsGuardConfig(ratio=0.3, user_steps=2, episode=4)
    turns = [trainer.turn(step) for step in range(12)]
    assert [turn.mask for turn in turns] == [False, False, True] * 4
    assert [turn.role for turn in turns] == ["illegal"] * 6 + ["innocent"] * 6
    assert [step for step, turn in enumerate(turns) if turn.last] == [5, 11]
    trainer.config = FreezeAsGuardConfig(ratio=0.3, users="joint", user_steps=2, episode=0)
    turns = [trainer.turn(step) for step in range(6)]
    assert [turn.role for turn in turns] == ["illegal"] * 3 + ["innocent"] * 3 and not any(turn.last for turn in turns)


def test_each_domain_is_seen_in_its_turn(straight: Path) -> None:
    lines = metric_lines(straight)
    assert [("illegal_loss" in line, "innocent_loss" in line) for line in lines] == [(True, False)] * 5 + [(False, True)] * 5
    # the mask is flat until both domains have been measured, which is after the tenth step
    assert lines[8]["mask_softness"] == pytest.approx(0.3 * 0.7, abs=1e-5)


def test_the_same_seed_gives_the_same_mask_and_another_one_another(straight: Path, tmp_path: Path) -> None:
    again, other = learn(tmp_path / "again"), learn(tmp_path / "other", run__seed=1)
    assert policy_files(again, 10) == policy_files(straight, 10)
    assert (again / "export" / "freeze_mask.json").read_bytes() == (straight / "export" / "freeze_mask.json").read_bytes()
    assert FreezeMask.load(other / "export").frozen != FreezeMask.load(straight / "export").frozen


def begun(run: Path) -> set[str]:
    """Checkpoints that a killed run was writing."""
    return {path.name for path in (run / "checkpoints").glob(".step-*.tmp-*")}


def logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def learn_on(out: str) -> None:
    learn(Path(out), resume=logged(Path(out)) > 0, run__save_every=1)


def same(run: Path, straight: Path) -> None:
    assert policy_files(run, 10) == policy_files(straight, 10)
    assert metric_lines(run) == metric_lines(straight)
    assert (run / "export" / "freeze_mask.json").read_bytes() == (straight / "export" / "freeze_mask.json").read_bytes()
    assert not begun(run), "what a killed run had begun takes no room for ever"


def test_killed_in_a_step_and_in_a_checkpoint_and_resumed_it_is_the_straight_run(straight: Path, tmp_path: Path) -> None:
    run, chance = tmp_path / "run", random.Random(5)
    hits = {"checkpoint": 0, "step": 0}
    for _ in range(4 * KILLS):
        if sum(hits.values()) >= KILLS:
            break
        before, written, moment, seen = begun(run), logged(run), chance.uniform(0.0, 0.05), 0.0
        process = start(learn_on, str(run))

        def in_a_checkpoint(before: set[str] = before) -> bool:
            return bool(begun(run) - before)

        def in_a_step(written: int = written, moment: float = moment) -> bool:
            nonlocal seen
            if not seen and logged(run) > written:
                seen = time.monotonic()
            return bool(seen) and time.monotonic() - seen >= moment

        if hits["checkpoint"] <= hits["step"]:
            # It may just have finished writing; then this was a kill like any other.
            hits["checkpoint"] += kill_when(process, in_a_checkpoint) and in_a_checkpoint()
        else:
            hits["step"] += kill_when(process, in_a_step)
        if (run / "export").exists():  # it was through: begin again
            learn_on(str(run))
            same(run, straight)
            shutil.rmtree(run)
    learn_on(str(run))
    same(run, straight)
    assert sum(hits.values()) >= KILLS and hits["checkpoint"]
    print(hits)


def test_ratios_by_parameters_are_met_to_one_tensor(tmp_path: Path) -> None:
    mask = FreezeMask.load(learn(tmp_path / "run", method__count="parameters", method__ratio=0.4) / "export")
    largest = max(entry.parameters for entry in mask.tensors.values()) / sum(entry.parameters for entry in mask.tensors.values())
    assert mask.ratio["parameters"] == pytest.approx(0.4, abs=largest)


def learn_in_halves(out: str) -> None:
    learn(Path(out), optim__batch_size=1, run__save_every=10)


def test_two_processes_make_the_mask_of_one(tmp_path: Path) -> None:
    """Rows are cut from one order and gradients averaged, so scores agree to the rounding of sums."""
    from safetensors.torch import load_file

    one = learn(tmp_path / "one", optim__accumulate=2, optim__batch_size=1, run__save_every=10)
    two = tmp_path / "two"
    launched(2, learn_in_halves, str(two))
    first, second = (load_file(run / "checkpoints/step-00000010/policy.safetensors")["scores"] for run in (one, two))
    assert first.abs().max() > 0.01
    assert (first - second).abs().max() < 1e-3
    masks = [FreezeMask.load(run / "export").frozen for run in (one, two)]
    assert len(set(masks[0]) ^ set(masks[1])) <= 2


@pytest.mark.parametrize("scheme", ["random", "attention"])
def test_baselines_that_need_no_steps(scheme: str, tmp_path: Path) -> None:
    mask = FreezeMask.load(learn(tmp_path / "run", method__scheme=scheme, method__ratio=0.15, optim__steps=0) / "export")
    assert len(mask.frozen) == round(0.15 * 286)
    if scheme == "attention":
        assert all(".attn" in name and name.endswith("weight") for name in mask.frozen)


def test_the_gradient_and_saliency_baselines(tmp_path: Path) -> None:
    by_size = learn(tmp_path / "gradient", method__scheme="gradient", optim__steps=5)
    mask = FreezeMask.load(by_size / "export")
    assert all(entry.score >= 0 for entry in mask.tensors.values()) and len(mask.frozen) == 86
    more = {"method__scheme": "saliency", "method__users": "joint", "method__episode": 0}
    mask = FreezeMask.load(learn(tmp_path / "saliency", **more) / "export")
    # shares of gain, illegal minus innocent: each adds up to at most one in size
    assert 0 < sum(abs(entry.score) for entry in mask.tensors.values()) <= 2


def test_adapters_are_masked_by_layer(tmp_path: Path) -> None:
    out = learn(tmp_path / "lora", tuning="{name: lora, rank: 2}", method__ratio=0.5)
    mask = FreezeMask.load(out / "export")
    assert mask.recipe["candidates"] == 56 and len(mask.frozen) == 28 and len(mask.tensors) == 286
    assert all(".attn" in name for name in mask.frozen)
    base = FreezeMask.load(learn(tmp_path / "none", method__ratio=0.0, method__scheme="none", optim__steps=0) / "export")
    assert base.fingerprint == mask.fingerprint  # the adapters have left no trace in the hashes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.ratio=1.5"], "ratio must be in"),
        (["method.scheme=none"], "scheme 'none' freezes nothing"),
        (["method.episode=5"], "episode must be a multiple of user_steps"),
        (["method.innocent_weight=-1"], "innocent_weight must not be negative"),
        (["method.episode=0"], "users 'separate' take turns"),
        (["freezing={mask: x.json}"], "makes a mask and trains under none"),
        (["evaluate.every=5"], "makes a mask, to be compared by evaluate-guard"),
        (["optim.ema_decay=0.9"], "keeps no trained weights"),
    ],
)
def test_settings_without_meaning_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(GUARD, overrides)


def test_a_table_with_one_kind_of_domain_is_refused(tmp_path: Path) -> None:
    from mmalign.data.domains import open_domains
    from mmalign.errors import DataError

    line = {"id": "1", "prompt": "p", "image": "a.png", "role": "illegal"}
    (tmp_path / "one.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match="no row with role 'innocent' in the split 'learn'; both roles are needed"):
        open_domains(tmp_path / "one.jsonl", progress=False).rows("learn")
    (tmp_path / "typo.jsonl").write_text(json.dumps({**line, "role": "inocent"}) + "\n")
    with pytest.raises(DataError, match=r"column 'role': 'inocent' is not one of illegal, innocent; did you mean 'innocent'"):
        open_domains(tmp_path / "typo.jsonl", progress=False).rows("learn")


