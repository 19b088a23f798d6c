"""The selectivity benchmark at sizes where its figures mean nothing: what is validated on, the rule of the choice, every arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import freezing_choice as choice
import freezing_selectivity
import pytest
from filelock import FileLock
from freezing_study import DOMAINS, FOLDS, Scheme, World, validation

from mmalign.data.domains import open_domains
from mmalign.freezing.baselines import TOLERANCE, matched_scored


def test_validation_shares_nothing_with_the_report(tmp_path: Path) -> None:
    splits = ("learn", "adapt", "test")
    reported = open_domains(DOMAINS, progress=False)
    judged = {reported[row].domain for split in splits[1:] for rows in reported.rows(split).values() for row in rows}
    for fold, (learnt, validated) in enumerate(FOLDS):
        table = open_domains(validation(tmp_path, fold, 1).manifest, progress=False)
        found = {split: {table[row].domain for rows in table.rows(split).values() for row in rows} for split in splits}
        assert found == {"learn": learnt, "adapt": validated, "test": validated}
        assert not (learnt | validated) & judged and not learnt & validated
    assert set().union(*(learnt for learnt, _ in FOLDS)) == {"ann", "bob", "cai", "dov", "dots", "rows", "slant"}


def test_the_highest_mean_wins_and_caution_breaks_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {1.0: 0.296, 0.6: 0.2, 0.3: 0.30}
    monkeypatch.setattr(choice.Trial, "selectivity", lambda self, world: values[self.scheme.weight])

    monkeypatch.setattr(World, "done", lambda self, name, seed: True)

    def chosen() -> dict[str, Any]:
        return choice.choose(tmp_path, [0.3], choice.SCHEMES, [World(manifest="-", folder=tmp_path)] * 2)

    assert chosen()["learned"]["chosen"] == chosen()["saliency"]["chosen"] == "1"  # within the tie of 3/10, and before it
    values[1.0] = 0.29
    assert chosen()["learned"]["chosen"] == "3/10"
    assert json.loads((tmp_path / "choice.json").read_text())["learned"]["means"]["1"] == 0.29


def test_only_whole_folds_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.Trial, "selectivity", lambda self, world: self.scheme.weight)
    worlds = [World(manifest="-", folder=tmp_path / str(fold)) for fold in range(2)]
    monkeypatch.setattr(World, "done", lambda self, name, seed: self is worlds[0] or "w0.3" not in name)
    assert choice.choose(tmp_path, [0.3], ["learned"], worlds)["folds"] == [0]
    monkeypatch.setattr(World, "done", lambda self, name, seed: False)
    with pytest.raises(choice.EvaluationError, match="no fold of the choice is finished"):
        choice.choose(tmp_path, [0.3], ["learned"], worlds)


def test_every_weight_is_tried_once() -> None:
    every = list(choice.trials([0.1, 0.3, 0.5], choice.SCHEMES))
    assert len(set(every)) == len(every) == 2 * 2 * 3 * 3
    assert {trial.scheme.weight for trial in every if trial.ratio == 0.5} == {1.0, 0.6, 0.3}


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
    common = ["--out", str(tmp_path), "--seeds", "0", "--ratios", "0.3", "--user-steps", "1", "--shortened", "15"]
    common += ["--matched", "1"]
    assert freezing_selectivity.main(common) == 0
    printed = capsys.readouterr().out
    others = ("as many tensors", "as many parameters", "by score per parameter", "by score")
    for label in ("learned", *(f"saliency, {words}" for words in others), "random, as many of both"):
        assert f"| 30% | {label} |" in printed and (label == "learned" or f"learned minus {label}" in printed)
    arms = {file.stem: json.loads(file.read_text())["ratio"] for file in (tmp_path / "held-out" / "arms").glob("*.json")}
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
