"""Windows of weighted means, and a metrics file that holds whole lines only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from mmalign.engine.metrics import MetricsFile, WindowMeans


def window() -> WindowMeans:
    found = WindowMeans()
    found.add({"loss": torch.tensor(2.0), "margin": torch.tensor(1.0)}, torch.tensor(3.0))
    found.add({"loss": torch.tensor(6.0)}, torch.tensor(1.0))
    return found


def test_means_are_weighted_by_rows_and_the_window_empties() -> None:
    accelerator, found = Accelerator(cpu=True), window()
    assert found.reduce(accelerator) == {"loss": 3.0, "margin": 1.0}  # (2 * 3 + 6 * 1) / 4
    assert found.reduce(accelerator) == {}
    found.add({"loss": torch.tensor(5.0)}, torch.tensor(2.0))
    assert found.reduce(accelerator) == {"loss": 5.0}


def test_what_no_row_counted_for_has_no_mean() -> None:
    window, one = WindowMeans(), torch.tensor(1.0)
    window.add({"loss": torch.tensor(0.0), "other": torch.tensor(0.0)}, torch.tensor(0.0))
    window.add({"other": torch.tensor(float("nan"))}, one)
    found = window.reduce(Accelerator(cpu=True))
    assert list(found) == ["other"] and found["other"] != found["other"], "a value that is not finite is not hidden"


def test_a_window_survives_a_checkpoint() -> None:
    accelerator, again = Accelerator(cpu=True), WindowMeans()
    again.load_state_dict(window().state_dict(), torch.device("cpu"))
    again.add({"loss": torch.tensor(0.0)}, torch.tensor(2.0))
    assert again.reduce(accelerator) == {"loss": 2.0, "margin": 1.0}


def test_window_values_are_detached() -> None:
    value = torch.tensor(2.0, requires_grad=True)
    found = WindowMeans()
    found.add({"loss": value * 2}, torch.tensor(1.0))
    assert not found.sums["loss"].requires_grad


def lines(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "loss": 0.5})
    file.append({"step": 2, "loss": float("nan"), "norm": float("inf")})
    assert lines(file.path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None, "norm": None}]
    assert "NaN" not in file.path.read_text() and file.path.read_text().endswith("\n")


@pytest.mark.parametrize("tail", ["", '{"step": 3, "lo', '{"step": 2, "loss": 1.0}'])
def test_later_lines_and_a_cut_last_line_are_dropped(tmp_path: Path, tail: str) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 10):
        file.append({"step": step, "loss": 1.0})
    with file.path.open("a") as handle:
        handle.write(tail)
    file.cut_after(2)
    kept = lines(file.path)
    assert [line["step"] for line in kept][:2] == [1, 2] and all(line["step"] <= 2 for line in kept)  # type: ignore[operator]
    file.append({"step": 3, "loss": 2.0})
    assert lines(file.path)[-1] == {"step": 3, "loss": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nothing_to_cut(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").cut_after(5)
    assert list(tmp_path.iterdir()) == []
