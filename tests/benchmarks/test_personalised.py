"""The tables of the benchmark of people, on results of which everything is known."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from personalised import main
from personalised_table import beats, curve, mixes, pooled, rates, read, tables

from mmalign.world.people import Person, liking, people

PROMPTS = 4


def pictures(vector: tuple[float, float]) -> dict[str, list[object]]:
    """Measures of four pictures that all lie at one point."""
    return {"properties": [list(vector)] * PROMPTS, "oracle": [0.5] * PROMPTS}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Everybody's pictures lie where that person likes them; the base at the origin; one model for all a little to the warm."""
    persons = people(4, 4)
    clip = {"base": pictures((0.0, 0.0)), **{person.name: pictures(person.taste) for person in persons}}
    for person in persons:
        if not person.trained:
            clip[f"{person.name} x1"] = pictures((-person.taste[0], -person.taste[1]))
    a, b = persons[0].taste, persons[2].taste
    for share in (0.25, 0.5):
        clip[f"opposite prediction {share:g}"] = pictures(tuple((1 - share) * x + share * y for x, y in zip(a, b, strict=True)))  # type: ignore[arg-type]
    folder = tmp_path / "seed-0"
    folder.mkdir()
    (folder / "clip.json").write_text(json.dumps({"pictures": clip, "complete": True}))
    (folder / "dpo.json").write_text(json.dumps({"pictures": {"dpo": pictures((2.0, 0.0))}, "complete": True}))
    return tmp_path


def test_everybody_has_an_opposite_and_newcomers_stand_between() -> None:
    everybody = people()
    assert [sum(person.trained is kind for person in everybody) for kind in (True, False)] == [24, 12]
    for group in (everybody[:24], everybody[24:]):
        for person in group:
            facing = [one for one in group if abs((one.angle - person.angle) % 360 - 180) < 1e-9]
            assert len(facing) == 1 and np.allclose(facing[0].taste, [-value for value in person.taste])
    assert not {round(person.angle, 6) for person in everybody[:24]} & {round(person.angle, 6) for person in everybody[24:]}
    assert Person(name="x", angle=90.0, trained=True).words == "vivid"
    assert liking(Person(name="x", angle=180.0, trained=True), np.array([[2.0, 5.0]])).tolist() == pytest.approx([-2.0])


def test_rates_are_those_worked_out_by_hand(out: Path) -> None:
    assert beats(np.array([1.0, 0.0, 2.0]), np.array([0.0, 0.0, 3.0])) == 0.5
    found = rates(read(out, [0])[0], "clip", True)
    assert found["base"] == [1.0] * 4
    # warm (1, 0) against (2, 0): loses; vivid and pale: 1 against 0; cool: 1 against -2.
    assert found["dpo"] == [0.0, 1.0, 1.0, 1.0]
    assert found["opposite"] == [0.0] * 4
    # Of three others one is opposite (loses) and two at a right angle (ties with the base, up to rounding of a sine).
    assert all(0.0 <= value <= 2 / 3 for value in found["others"])
    assert found["own over others"] == [1.0] * 4
    assert len(pooled(read(out, [0]), "clip", False)["base"]) == 4


def test_curve_and_mixtures(out: Path) -> None:
    results = read(out, [0])
    assert {shots: one.mean for shots, one in curve(results, "clip").items()} == {1: 0.0, 4: 1.0}
    found = mixes(results, "opposite", "prediction")
    # 24 people are not here: A is the first and B the one that the numbers 0 and 12 wrap round to, the first again.
    assert list(found) == [0.0, 0.25, 0.5, 1.0] and found[0.25][0].mean == pytest.approx(0.5)


def test_the_command_prints_tables_and_writes_plots(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "0", "--table", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "| CLIP differences | trained | 100.0% (100.0% to 100.0%) | 75.0%" in shown and shown.count("| person-") == 4
    assert tables(out, [0]) in (out / "table.md").read_text()
    for name in ("personalised-pairs.svg", "personalised-mix.svg"):
        assert ElementTree.parse(out / name).getroot().tag.endswith("svg")
