"""Caches filled ahead: for an experiment, or by kinds of a table; found again, shared, and never confused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mmalign import rewards
from mmalign.cli.application import app
from mmalign.data import Cache, open_table
from mmalign.errors import ConfigError, DataError
from mmalign.experiment.caching import TableJob, family_of, fill_table
from mmalign.scoring.stored import StoredScores, pictures_of
from tests.data.clips import clip
from tests.data.making import make_pairs

Folders = Callable[[str], Path]


def shards(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.glob("*/*/shard-*")}


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_table_by_kinds_holds_what_a_run_asks_for(tiny_folder: Folders, tmp_path: Path) -> None:
    table, model = make_pairs(tmp_path / "table", 6), tiny_folder("sd1")
    said = run("cache", table, "--kind", "vae,text", "--model", model, "--resolution", 32)
    assert said.startswith("vae, text: 6 rows cached")
    before = shards(table / "cache")
    (tmp_path / "e.yaml").write_text(
        f"method: {{name: diffusion_dpo}}\nmodel: {{name: sd, path: {model}}}\ndata: {{manifest: {table}, resolution: 32}}\n"
        f"optim: {{lr: 1e-4, steps: 1}}\nrun: {{name: x, out: {tmp_path / 'run'}, device: cpu}}\n"
    )
    run("cache", tmp_path / "e.yaml")
    assert shards(table / "cache") == before and {name.split("/")[0] for name in before} == {"vae", "text"}
    run("cache", table, "--kind", "text", "--model", model, "--resolution", 32, "--drop-caption")
    assert len(shards(table / "cache")) == len(before) + 1  # the empty prompt alone
    run("cache", table, "--kind", "vae", "--model", model, "--resolution", 64, "--cache", tmp_path / "other")
    assert {name.split("/")[0] for name in shards(tmp_path / "other")} == {"vae"}


def test_processes_fill_what_one_process_fills(tmp_path: Path) -> None:
    table = make_pairs(tmp_path / "table", 5)
    one = TableJob(table=str(table), kinds=("scores",), rewards=("brightness",), root=str(tmp_path / "one"), check="off")
    fill_table(one)
    two = TableJob(table=str(table), kinds=("scores",), rewards=("brightness",), root=str(tmp_path / "two"), check="off")
    (line,) = fill_table(two, engine="processes", workers=2)
    assert "5 rows, 0 computed" in line  # the others left nothing to do
    records = [open_table(table)[row] for row in range(5)]
    keys = [StoredScores(rewards.load(["brightness"]), tmp_path / "one")._digest(image)
            for record in records for image in pictures_of(record)]  # fmt: skip
    values = [Cache(folder).gather(keys)["score"] for root in ("one", "two") for folder in (tmp_path / root / "scores").iterdir()]
    assert torch.equal(values[0], values[1])


def test_scores_are_computed_once_and_by_content(tmp_path: Path) -> None:
    table = open_table(make_pairs(tmp_path / "table", 4))
    records = [table[row] for row in range(4)]
    images = [image for record in records for image in pictures_of(record)]
    prompts = [record.prompt for record in records for _ in range(2)]
    scorers = rewards.load(["tiny-clip", "brightness"])
    expected = scorers.score(images, prompts)
    store = StoredScores(scorers, tmp_path / "cache")
    first = store.score(images[:5], prompts[:5])
    assert store.computed == 10
    again = store.score([*images, images[0]], [*prompts, prompts[0]])
    assert store.computed == 16
    for name in ("tiny-clip", "brightness"):
        assert again[name].values[:8].tolist() == pytest.approx(expected[name].tolist(), abs=1e-5)
        assert torch.equal(again[name].values[:5], first[name].values)
        assert again[name].values[8] == again[name].values[0]
    store.flush()
    fresh = StoredScores(scorers, tmp_path / "cache")
    assert torch.equal(fresh.score(images, prompts)["tiny-clip"].values, again["tiny-clip"].values[:8])
    assert fresh.computed == 0
    # Another prompt is another score of a reward that reads prompts, and the same of one that does not.
    fresh.score(images[:1], ["something else"])
    assert fresh.computed == 1
    broken = fresh.score([type(images[0])(data=b"no picture")], ["x"])["brightness"]
    assert torch.isnan(broken.values).all() and broken.errors == ("unsupported_format",)
    assert len(StoredScores(rewards.load(["tiny-clip"], dtype="bf16"), tmp_path / "cache").caches["tiny-clip"]) == 0


def test_embeddings_are_those_of_the_reward(tmp_path: Path) -> None:
    table = make_pairs(tmp_path / "table", 3)
    run("cache", table, "--kind", "clip", "--reward", "tiny-clip")
    scorers = rewards.load(["tiny-clip"])
    store = StoredScores(scorers, table / "cache", embeddings=True)
    images = [image for row in range(3) for image in pictures_of(open_table(table)[row])]
    found = store.gather("tiny-clip", images)
    details = scorers.engine.run(images, ["x"] * 6, embeddings=True)["tiny-clip"]
    assert details.embeddings is not None and found.shape == details.embeddings.shape
    assert torch.allclose(found, details.embeddings, atol=1e-5)
    with pytest.raises(DataError, match="'brightness' has no embedding of pictures"):
        StoredScores(rewards.load(["brightness"]), tmp_path / "c", embeddings=True).fill(images, ["x"] * 6)
    with pytest.raises(DataError, match="keeps embeddings"):
        store.score(images, ["x"] * 6)


def test_frames_of_a_table_of_answers(tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        (tmp_path / f"{number}.mp4").write_bytes(clip(9 + number) if number < 2 else b"no clip")
        prompt = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": f"What happens? {number}"}]}]
        turns = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "up"), ("rejected", "down"))}
        rows.append({"id": f"r{number}", "prompt": prompt, "videos": [f"{number}.mp4"], **turns})
    table = tmp_path / "answers.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("cache", table, "--kind", "frames", "--sampler", "interior", "--frames", 4, "--max-side", 24)
    assert "3 clips, 2 decoded, 1 clips cannot be decoded" in run(*command)
    assert "3 clips, 0 decoded" in run(*command)


def test_what_cannot_be_asked_for(tiny_folder: Folders, tmp_path: Path) -> None:
    for settings, words in (
        ({"kinds": ("vea",)}, "--kind: vea; known for a table are vae, text, clip, scores, frames"),
        ({"kinds": ()}, "none given"),
        ({"kinds": ("reflogp",)}, "filled from an experiment file"),
        ({"kinds": ("vae",)}, "--model: the kinds vae and text need"),
        ({"kinds": ("scores",)}, "--reward: the kinds scores and clip need"),
    ):
        with pytest.raises(ConfigError, match=words):
            TableJob(table=str(tmp_path), **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="name the family with --family"):
        family_of(str(tmp_path))
    assert family_of(str(tiny_folder("sd1"))) == "sd"
    table = make_pairs(tmp_path / "table", 3)
    result = CliRunner().invoke(app, ["data", "cache", str(table)])
    assert result.exit_code == 2 and "name what to cache of it with --kind" in " ".join(result.output.split())
