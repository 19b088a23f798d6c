"""Candidates from two tiny models: seeds, order, shards, interruptions, and the way on to a ranked table."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign import generate as module
from mmalign.annotate import annotate
from mmalign.data import open_ranked
from mmalign.errors import ConfigError, DataError, MmalignError
from mmalign.generate import candidate_seed, generate, initial_noise, load_generation, prompt_id

Folders = Callable[[str], Path]
PROMPTS = ["a red circle", "a blue star", "a green cross"]


def settings(tiny_folder: Folders, folder: Path, **more: object) -> module.GenerateConfig:
    """Two candidates from one model and one from another, two prompts a part."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "config.yaml").write_text(
        f"prompts: {folder}/prompts.txt\nout: {folder}/out\nprompts_per_part: 2\ndevice: cpu\nseed: 5\nsources:\n"
        f"  - {{label: one, model: {{name: sd, path: {tiny_folder('sd1')}}}, candidates: 2, steps: 2, batch_size: 3}}\n"
        f"  - {{label: two, model: {{name: sd, path: {tiny_folder('sd2')}}}, steps: 1, guidance: 1.0}}\n"
    )
    return load_generation(folder / "config.yaml", [f"{name}={value}" for name, value in more.items()])


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [row for file in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_a_table_of_lists_with_the_seed_of_every_picture(tiny_folder: Folders, tmp_path: Path) -> None:
    config = settings(tiny_folder, tmp_path)
    report = generate(config, progress=False)
    assert (report.prompts, report.pictures, report.missing) == (3, 9, 0)
    table = open_ranked(tmp_path / "out")
    assert [table[row].prompt for row in range(3)] == PROMPTS
    assert all(len(table[row].images) == 3 for row in range(3))
    row = rows_of(tmp_path / "out")[1]
    candidates = json.loads(str(row["meta"]))["candidates"]
    name = prompt_id(1, PROMPTS[1])
    assert row["id"] == name
    assert [item["model"] for item in candidates] == ["one", "one", "two"]
    assert [item["seed"] for item in candidates] == [
        candidate_seed(5, "one", 0, name), candidate_seed(5, "one", 1, name), candidate_seed(5, "two", 0, name)
    ]  # fmt: skip
    assert len({item["seed"] for item in candidates}) == 3
    assert not list(tmp_path.glob(".out*")), "nothing of the making is left"


def test_a_stored_seed_makes_the_picture_again(tiny_folder: Folders, tmp_path: Path) -> None:
    from tests.fixtures.tiny import load

    config = settings(tiny_folder, tmp_path)
    generate(config, progress=False)
    row = rows_of(tmp_path / "out")[2]
    family = load("sd1", tiny_folder("sd1"))
    seed = json.loads(str(row["meta"]))["candidates"][1]["seed"]
    noise = initial_noise(seed, family.latent_shape)[None]
    again = family.sample(family.network, [PROMPTS[2]], noise, steps=2, guidance=7.5, batch_size=1)[0]
    stored = np.asarray(Image.open(io.BytesIO(row["images"][1]["bytes"])))  # type: ignore[index]
    # Another batch size may round a pixel the other way.
    assert np.abs(stored.astype(int) - again.astype(int)).max() <= 1


def test_shards_give_what_one_process_gives(tiny_folder: Folders, tmp_path: Path) -> None:
    generate(settings(tiny_folder, tmp_path / "whole"), progress=False)
    config = settings(tiny_folder, tmp_path / "cut")
    first = generate(config, shard=(1, 2), progress=False)
    assert first.path is None and first.missing == 2 and "left to other shards" in str(first)
    last = generate(config, shard=(0, 2), progress=False)
    assert last.path == tmp_path / "cut" / "out"
    assert rows_of(tmp_path / "cut" / "out") == rows_of(tmp_path / "whole" / "out")


def test_an_interrupted_run_goes_on_and_other_settings_are_not_mixed_in(
    tiny_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_folder, tmp_path)
    real, made = module.sample_candidates, []

    def stops(*arguments: object) -> object:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "sample_candidates", stops)
    with pytest.raises(KeyboardInterrupt):
        generate(config, progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "sample_candidates", real)
    with pytest.raises(DataError, match="other settings"):
        generate(settings(tiny_folder, tmp_path, seed=6), progress=False)
    report = generate(settings(tiny_folder, tmp_path), progress=False)
    assert report.pictures == 1 and len(rows_of(tmp_path / "out")) == 3
    with pytest.raises(DataError, match="already exists"):
        generate(settings(tiny_folder, tmp_path), progress=False)


def test_candidates_can_be_ranked(tiny_folder: Folders, tmp_path: Path) -> None:
    generate(settings(tiny_folder, tmp_path), progress=False)
    annotate(tmp_path / "out", tmp_path / "lists", ["brightness", "saturation"], progress=False)
    table = open_ranked(tmp_path / "lists")
    assert table.rewards == ("brightness", "saturation")
    kept = json.loads(str(rows_of(tmp_path / "lists")[0]["meta"]))
    assert [item["model"] for item in kept["candidates"]] == ["one", "one", "two"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"sources": "[]"}, "at least one"), ({"prompts_per_part": 0}, "prompts_per_part"),
        ({"sourcs": 1}, "did you mean 'sources'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tiny_folder: Folders, tmp_path: Path, more: dict[str, object], words: str) -> None:
    with pytest.raises(MmalignError, match=words):
        settings(tiny_folder, tmp_path, **more)


def test_a_shard_that_does_not_exist(tiny_folder: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="counted from 0"):
        generate(settings(tiny_folder, tmp_path), shard=(2, 2), progress=False)
