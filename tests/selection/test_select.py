"""The whole selection through the public command, on real films with cuts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mmalign.cli.application import app
from mmalign.data import open_vlm
from mmalign.errors import ConfigError, DataError, ModelError
from mmalign.selection import run as selection_run
from mmalign.selection.detectors import behind
from mmalign.selection.run import select
from mmalign.selection.settings import SelectionConfig, ShotsConfig, load_selection
from mmalign.selection.transnet import TransNetV2
from mmalign.world.clips import encode_mp4
from mmalign.world.shapes import Style, parse, render

pytest.importorskip("av")
pytest.importorskip("scenedetect")

SCENES = (
    "a large red circle on a black background", "a large blue square on a white background",
    "a large green star on a grey background", "a large yellow cross on a black background",
    "a large purple triangle on a grey background", "two cyan stars on a grey background",
)  # fmt: skip


def film(path: Path, scenes: list[int], frames: int = 10) -> None:
    """One shot a scene: a still with a little noise."""
    rng = np.random.default_rng(1)
    shown = []
    for number in scenes:
        still = render(parse(SCENES[number]), np.random.default_rng(number), Style()).repeat(2, 0).repeat(2, 1)
        shown += [np.clip(still + rng.normal(0, 2, still.shape), 0, 255).astype(np.uint8) for _ in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mp4(np.stack(shown)))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    film(folder / "good.mp4", [0, 1, 2, 3, 4, 5])
    film(folder / "sub" / "forth and back é.mp4", [0, 1, 0, 1, 0, 1])
    film(folder / "single.mp4", [2], frames=40)
    film(folder / "slow.mp4", [0, 1, 2, 3], frames=40)
    (folder / "black.mp4").write_bytes(encode_mp4(np.zeros((60, 64, 64, 3), np.uint8)))
    (folder / "cut.mp4").write_bytes((folder / "good.mp4").read_bytes()[:900])
    (folder / "notes.txt").write_text("not a film")
    return folder


def settings(films: Path, out: Path, **more: object) -> SelectionConfig:
    rules = {
        "similarity": 0.985,
        "max_shot_seconds": 3.0,
        **more,
    }  # the embedded encoder finds drawings more alike than photos are
    return SelectionConfig(films=str(films), out=str(out), rules=rules, device="cpu")  # type: ignore[arg-type]


def test_films_are_kept_and_refused_for_named_reasons(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = select(settings(films, tmp_path / "out"), progress=False)
    refused = {
        line["id"]: line["reason"]
        for line in map(json.loads, (tmp_path / "out/refused.jsonl").read_text().splitlines())
    }
    assert refused == {
        "sub/forth and back é.mp4": "repetitive", "single.mp4": "too_few_shots", "slow.mp4": "long_shot",
        "black.mp4": "too_few_shots", "cut.mp4": "unreadable_video",
    }  # fmt: skip
    assert (report.films, report.kept, report.failed, report.ignored) == (6, 1, 1, 1)
    record = open_vlm(tmp_path / "out/films.jsonl", progress=False)[0]
    assert record.meta["clips"] == [[pytest.approx(1.25 * n), pytest.approx(1.25 * (n + 1))] for n in range(6)]
    assert record.meta["groups"] == [0, 1, 2, 3, 4, 5] and np.asarray(record.meta["similarity"]).shape == (6, 6)
    inside = [
        all(first <= time < last for time in own)
        for (first, last), own in zip(record.meta["clips"], record.meta["frames"], strict=True)
    ]
    assert all(inside) and {len(own) for own in record.meta["frames"]} == {2}
    page = (tmp_path / "out/selection.html").read_text()
    assert "1 of 6 films kept" in page and "data:image/jpeg;base64," in page and "forth and back" in page

    def never(*arguments: object, **settings: object) -> None:
        raise AssertionError("a film was looked at twice")

    monkeypatch.setattr(selection_run, "survey", never)
    (films / "cut.mp4").rename(films / "cut.txt")
    try:
        again = select(settings(films, tmp_path / "out", max_shot_seconds=6.0), progress=False)
    finally:
        (films / "cut.txt").rename(films / "cut.mp4")
    assert again.kept == 2


def test_the_table_feeds_the_sampler_and_a_table_can_be_the_source(films: Path, tmp_path: Path) -> None:
    select(settings(films, tmp_path / "out", max_shot_seconds=6.0), progress=False)
    again = select(settings(tmp_path / "out/films.jsonl", tmp_path / "again", max_shot_seconds=6.0), progress=False)
    assert (again.films, again.kept) == (2, 2)


def test_the_command(films: Path, tmp_path: Path) -> None:
    (tmp_path / "select.yaml").write_text(
        f"films: {films}\nout: {tmp_path}/out\ndevice: cpu\nrules: {{similarity: 0.985, min_sharpness: 200}}\n"
    )
    done = CliRunner().invoke(app, ["data", "select", str(tmp_path / "select.yaml"), "shots.detector=adaptive"])
    assert done.exit_code == 3, done.output  # one film cannot be read
    assert "0 of 6 films kept" in done.output and "blurred" in done.output
    assert load_selection("configs/select/temple.yaml").rules.min_clips == 4


def test_bad_settings_and_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder or table"):
        select(settings(tmp_path / "none", tmp_path / "out"), progress=False)
    with pytest.raises(DataError, match="holds no video"):
        select(settings(tmp_path, tmp_path / "out"), progress=False)
    (tmp_path / "s.yaml").write_text("films: a\nout: b\nrules: {min_shots: 9, max_shots: 3}\n")
    with pytest.raises(ConfigError, match="max_shots"):
        load_selection(tmp_path / "s.yaml")
    with pytest.raises(ConfigError, match="no CLIP-type reward"):
        select(
            SelectionConfig(films=str(_one(tmp_path)), out=str(tmp_path / "o"), features="brightness"),
            progress=False,
        )


def weights_that_compare_neighbours(path: Path) -> str:
    """TransNetV2 weights worked out by hand: a frame is marked when its colours differ from those of the next frame.

    Place 51 of the likeness by colour is the next frame; one feature is relu(1 - that), and both outputs are 100 x it - 4.
    """
    state = {name: torch.zeros_like(value) for name, value in TransNetV2().state_dict().items()}
    for name in state:
        if name.endswith("running_var"):
            state[name] += 1
    state["color_hist_layer.fc.weight"][0, 51] = -1
    state["color_hist_layer.fc.bias"][0] = 1
    state["fc1.weight"][0, 0] = 1
    for layer in ("cls_layer1", "cls_layer2"):
        state[f"{layer}.weight"][0, 0], state[f"{layer}.bias"][0] = 100, -4
    save_file(state, path)
    return str(path)


def test_a_network_as_detector(films: Path, tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    (tmp_path / "films/good.mp4").write_bytes((films / "good.mp4").read_bytes())
    shots = {"detector": "transnetv2", "weights": weights_that_compare_neighbours(tmp_path / "tn.safetensors")}
    config = SelectionConfig(
        films=str(tmp_path / "films"), out=str(tmp_path / "out"), device="cpu", shots=shots,  # type: ignore[arg-type]
        rules={"similarity": 0.985, "max_shot_seconds": 3.0},  # type: ignore[arg-type]
    )  # fmt: skip
    assert select(config, progress=False).kept == 1
    record = open_vlm(tmp_path / "out/films.jsonl", progress=False)[0]
    assert record.meta["clips"] == [[pytest.approx(1.25 * n), pytest.approx(1.25 * (n + 1))] for n in range(6)]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["detector"].startswith("transnetv2|")
    facts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/facts").iterdir()}
    (tmp_path / "tn.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(ModelError, match=r"no weight file at .*tn\.safetensors"):
        select(config, progress=False)
    shots["weights"] = str(tmp_path / "moved.safetensors")  # the same weights elsewhere: no film is looked at again
    assert select(config.model_copy(update={"shots": ShotsConfig(**shots)}), progress=False).kept == 1  # type: ignore[arg-type]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/facts").iterdir()} == facts


def test_shots_begin_behind_what_is_marked() -> None:
    assert behind(np.array([False, True, True, False, True, False, False, True])) == [3, 5]
    assert behind(np.zeros(0, bool)) == behind(np.ones(3, bool)) == []


def test_settings_of_the_network() -> None:
    for shots, message in (
        ({"detector": "transnetv2"}, "mmalign rewards convert"), ({"weights": "a"}, "no effect with detector 'content'"),
        ({"detector": "transnetv2", "weights": "a", "threshold": 27.0}, "a probability"), ({"head": "one_hot"}, "no effect"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ShotsConfig(**shots)  # type: ignore[arg-type]


def _one(folder: Path) -> Path:
    film(folder / "films" / "a.mp4", [0])
    return folder / "films"
