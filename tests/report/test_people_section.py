"""The page of a personalised run shows people; other pages have no empty box for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from mmalign.report import build_report

RATE = {"mean": 0.9, "low": 0.8, "high": 1.0, "prompts": 10, "excluded": 0}


def run_folder(folder: Path, method: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"method": method, "run": {"name": "x"}}))
    return folder


def page(folder: Path) -> str:
    return build_report(folder).read_text(encoding="utf-8")


def test_people_are_shown_with_their_rates_and_sheets(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", {"name": "personalized_dpo", "users": {"shots": 4}})
    assert "no pictures were made for anybody yet" in page(folder)
    one = folder / "personal" / "0123456789ab"
    one.mkdir(parents=True)
    Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8)).save(one / "grid.png")
    told = {"users": ["0123456789abcdef"], "weights": [1.0], "scale": 1.0, "guidance": 1.5, "seed": 3}
    (one / "personal.json").write_text(json.dumps(told))
    row = {"person": "<b>eve</b>", "likes": "warm", "trained": False, "win_rate": RATE}
    (folder / "personal" / "people.json").write_text(json.dumps({"rows": [row]}))
    text = page(folder)
    assert "&lt;b&gt;eve" in text and "<b>eve" not in text and "never seen" in text and "90\u00a0%" in text
    assert "0123456789ab 1; scale 1, guidance 1.5, seed 3" in text and text.count("Base and personal pictures") == 1
    # What was compared person by person is the claim; nothing asks for a comparison that this run does not need.
    assert "Own pictures win against the base by own taste: 90\u00a0% for 1 person never seen." in text
    assert "no evaluation against the base" not in text and "holds no evaluation" not in text
    (one / "personal.json").write_text("{")
    assert "personal.json cannot be read" in page(folder)


def test_other_runs_have_no_section_of_people(tmp_path: Path) -> None:
    assert "Person by person" not in page(run_folder(tmp_path / "run", {"name": "diffusion_dpo"}))
