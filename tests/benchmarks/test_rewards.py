"""The scoring benchmark at a size where its figures mean nothing: it runs, counts, and refuses to compare unlike with unlike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rewards as scoring_bench
import rewards_resume
from rewards_inputs import make_workloads

SMALL = ["--model", "embedded", "--images", "4", "--side", "40", "--batch", "4", "--loop-cells", "2", "--rounds", "1"]


def test_prints_every_workload_with_call_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert scoring_bench.main([*SMALL, "--dtypes", "fp32", "--json", str(out)]) == 0
    rows = {row["workload"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["distinct", "candidates", "pairs"]
    counts = {name: (row["cells"], row["images_encoded"], row["texts_encoded"]) for name, row in rows.items()}
    # Three rewards on one CLIP are one pass; twelve cells of six pairs hold four pictures and one prompt.
    assert counts == {"distinct": (4, 4, 4), "candidates": (4, 4, 1), "pairs": (12, 4, 1)}
    printed = capsys.readouterr().out
    assert printed.count("bound x") == printed.count("with the network read at every call") == 3
    assert "matrix products alone would allow" in printed


def test_unlike_results_are_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(scoring_bench.TOLERANCE, "fp32", -1.0)
    assert scoring_bench.main([*SMALL, "--dtypes", "fp32"]) == 2
    assert "differs by" in capsys.readouterr().err


def test_workloads() -> None:
    files = [Path(f"{index}.jpg") for index in range(8)]
    distinct, candidates, pairs = make_workloads(files)
    assert len(set(distinct.prompts)) == 8 and len(set(candidates.prompts)) == 2
    assert len(pairs.files) == 2 * 6 * 2 and pairs.distinct == 8


@pytest.mark.slow
def test_killed_and_resumed_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert rewards_resume.main(["--images", "320", "--kills", "1"]) == 0
    assert "320 rows, 6 of them failed, 0 differ from the uninterrupted run" in capsys.readouterr().out
