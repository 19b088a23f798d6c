"""The selectivity benchmark at sizes where its figures mean nothing: who is in which group, the rule of the choice, every arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import freezing_choice as choice
import freezing_selectivity
import freezing_study
import pytest
from filelock import FileLock
from freezing_study import Scheme, World, second_group, third_group

from mmalign.data.domains import open_domains
from mmalign.freezing.baselines import TOLERANCE, matched_scored
from mmalign.world.domains import PATTERNS, PERSONS
from tests.freezing.guarded import few_domains


def test_what_is_learnt_from_chosen_on_and_reported_shares_nobody(tmp_path: Path) -> None:
    chosen_on = second_group(tmp_path, 1)
    table, reported = (open_domains(world.manifest, progress=False) for world in (chosen_on, third_group(chosen_on, tmp_path)))

    def domains(table: Any, *splits: str) -> set[str]:
        return {table[row].domain for split in splits for rows in table.rows(split).values() for row in rows}

    groups = [domains(table, "learn"), domains(table, "adapt", "test"), domains(reported, "adapt", "test")]
    assert groups == [{*PERSONS[group], *PATTERNS[group]} for group in range(3)]
    assert len(set().union(*groups)) == sum(len(group) for group in groups)
    assert domains(reported, "adapt") == domains(reported, "test")


def test_the_highest_mean_wins_and_caution_breaks_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {1.0: 0.296, 0.3: 0.30}
    monkeypatch.setattr(choice.Trial, "selectivity", lambda self, world: values[self.scheme.weight])

    def chosen() -> dict[str, Any]:
        return choice.choose(tmp_path, [0.3], choice.SCHEMES, [0, 1], World(manifest="-", folder=tmp_path))

    assert chosen()["learned"]["chosen"] == chosen()["saliency"]["chosen"] == "1"  # within the tie of 3/10, and before it
    values[1.0] = 0.29
    assert chosen()["learned"]["chosen"] == "3/10"
    assert json.loads((tmp_path / "choice.json").read_text())["learned"]["means"]["1"] == 0.29


def test_every_weight_is_tried_once() -> None:
    every = list(choice.trials([0.1, 0.3, 0.5], choice.SCHEMES, [0, 1]))
    assert len(set(every)) == len(every) == 2 * 2 * 3 * 2
    assert {trial.scheme.weight for trial in every if trial.ratio == 0.5} == {1.0, 0.3}


def test_work_is_shared_and_never_done_twice(tmp_path: Path) -> None:
    """One job is in another's hands until the first thing that is done here lets it go."""
    done: list[int] = []
    held = FileLock(tmp_path / "0.lock")
    held.acquire()

    def do(number: int) -> None:
        done.append(number)
        held.release()

    jobs = [(tmp_path / f"{number}.lock", lambda number=number: number in done or number == 2, lambda number=number: do(number))
            for number in range(3)]  # fmt: skip
    freezing_selectivity.share(jobs)  # type: ignore[arg-type]
    assert done == [1, 0]


def test_share_is_met_from_the_top() -> None:
    """Of 1000 parameters 300 are wanted: the second does not fit, the others do."""
    sizes = {"a": 200, "b": 500, "c": 90, "d": 100, "e": 10, "f": 100}
    scores = {"a": 6.0, "b": 5.0, "c": 4.0, "d": 3.0, "e": 2.0, "f": 1.0}
    assert matched_scored(scores, sizes, share=0.3) == ("a", "c", "e")
    assert TOLERANCE < 0.01


@pytest.mark.slow
def test_every_arm_runs_and_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice, "RULES", {"1": lambda ratio: 1.0})
    monkeypatch.setattr(freezing_study, "DOMAINS", str(few_domains(tmp_path / "few")))
    monkeypatch.setattr(freezing_study, "REPORTED", {"adapt": 16, "test": 16})
    common = ["--out", str(tmp_path), "--seeds", "0", "--ratios", "0.3", "--user-steps", "1", "--shortened", "15"]
    common += ["--matched", "1"]
    assert freezing_selectivity.main(common) == 0
    printed = capsys.readouterr().out
    others = ("as many tensors", "as many parameters", "by score per parameter", "by score")
    for label in ("learned", *(f"saliency, {words}" for words in others), "random, as many of both"):
        assert f"| 30% | {label} |" in printed and (label == "learned" or f"learned minus {label}" in printed)
    arms = {file.stem: json.loads(file.read_text())["ratio"] for file in (tmp_path / "reported" / "arms").glob("*.json")}
    learned, tensors, share = (
        arms[f"{name}-seed0"]
        for name in ("learned-w1-r0.3", "saliency-w1-r0.3-tensors", "saliency-w1-r0.3-share-of-learned-w1-r0.3")
    )
    assert abs(learned["parameters"] - share["parameters"]) <= TOLERANCE and learned["tensors"] == tensors["tensors"]
    for name in ("learned-w1-r0.3-parameters", "saliency-w1-r0.3-parameters", "random-0-like-learned-w1-r0.3-parameters"):
        assert arms[f"{name}-seed0"]["parameters"] == pytest.approx(0.3, abs=0.03)  # to half of the largest tensor
    before = sorted(file.stat().st_mtime for file in tmp_path.rglob("*.json"))
    freezing_selectivity.main([*common, "--print"])
    assert capsys.readouterr().out == printed[printed.index("| scheme |") :]
    assert len(before) == len(list(tmp_path.rglob("*.json")))
    assert Scheme(name="saliency", weight=1.0).key(0.1) == Scheme(name="saliency", weight=1.0).key(0.5)
