"""The job around every sampler of answers: parts, shards, interruptions, refusals, provenance, bad files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mmalign import assets
from mmalign.branches import VideoRef
from mmalign.cli.application import app
from mmalign.data import open_vlm
from mmalign.data.partfolder import PartFolder
from mmalign.errors import ConfigError, DataError
from mmalign.sampling.job import sample_answers
from mmalign.sampling.settings import SamplingConfig, asks_for_answers, load_sampling
from tests.fixtures import tiny_vlm

ROOT = Path(__file__).resolve().parent.parent.parent


def settings(folder: Path, manifest: Path, *overrides: str, model: str | None = None) -> SamplingConfig:
    """Three answers a question from the embedded model, two rows a part."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.yaml").write_text(
        "sampler: {name: candidates, samples: 3, judges: [board-f1]}\n"
        f"model: {{name: vlm, path: {model or assets.path('tiny-vlm')}}}\n"
        f"manifest: {manifest}\nout: {folder}/out\nseed: 5\nmax_new_tokens: 12\ndevice: cpu\nrows_per_part: 2\n"
    )
    return load_sampling(folder / "config.yaml", list(overrides))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_a_table_of_lists_with_scores_and_where_each_row_came_from(questions: Path, tmp_path: Path) -> None:
    report = sample_answers(settings(tmp_path, questions), progress=False)
    assert (report.rows, report.made, report.missing, report.failed) == (5, 5, 0, 0)
    table = open_vlm(tmp_path / "out")
    assert table.kind == "lists" and [table.row_id(row) for row in range(5)] == ["d0", "d1", "d2", "d3", "d4"]
    record = table[1]
    assert len(record.answers) == 3 and all("board-f1" in answer.scores for answer in record.answers)
    assert record.media[0].data == (questions.parent / "pictures" / "1.png").read_bytes()  # type: ignore[union-attr]
    source = open_vlm(questions)[1]
    assert record.messages == source.messages and record.meta["scene"] == source.meta["scene"]
    sampled = record.meta["sampled"]
    assert (sampled["from"], sampled["seed"], sampled["model"]) == ("d1", 5, "tiny-vlm")
    assert sampled["sampler"]["name"] == "candidates" and len(sampled["network"]) == 32
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert kept["figures"]["answers"] == 15.0 and "answers" in str(report)
    assert not list(tmp_path.glob(".out*")), "nothing of the making is left"


def test_answers_are_those_of_the_model(questions: Path, tmp_path: Path) -> None:
    from mmalign.models.vlm import VLM_FAMILIES

    config = settings(tmp_path, questions)
    sample_answers(config, progress=False)
    family = VLM_FAMILIES.get("vlm").load(config.model, device=tiny_vlm.CPU)  # type: ignore[attr-defined]
    source = open_vlm(questions)
    wanted = family.generate(
        family.network, [family.encode(source[4], training=False)], max_new_tokens=12, seed=5, samples=3
    )[0]
    assert [answer.text for answer in open_vlm(tmp_path / "out")[4].answers] == wanted


def test_shards_and_interruptions_change_nothing(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample_answers(settings(tmp_path / "whole", questions), progress=False)
    config = settings(tmp_path / "cut", questions)
    first = sample_answers(config, shard=(1, 2), progress=False)
    assert first.path is None and first.made == 2 and first.missing == 2 and "left to other shards" in str(first)
    written = PartFolder.write

    def stopped(self: PartFolder, number: int, *rest: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        written(self, number, *rest)

    monkeypatch.setattr(PartFolder, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        sample_answers(config, progress=False)
    monkeypatch.setattr(PartFolder, "write", written)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut" / ".out.building").glob("*.parquet")}
    assert len(before) == 2
    last = sample_answers(config, progress=False)
    assert last.made == 5
    assert rows_of(tmp_path / "cut" / "out") == rows_of(tmp_path / "whole" / "out")


def test_other_processes_and_a_store_change_nothing(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_answers(settings(tmp_path / "whole", questions), progress=False)
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / "first"))
    out = f"file://{tmp_path}/bucket/answers"
    report = sample_answers(settings(tmp_path / "there", questions, f"out={out}"), engine="processes", workers=1, progress=False)
    assert (report.made, report.missing, report.path) == (5, 0, out)
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / "second"))
    assert rows_of(tmp_path / "bucket" / "answers") == rows_of(tmp_path / "whole" / "out")
    assert open_vlm(out)[4].answers == open_vlm(tmp_path / "whole" / "out")[4].answers
    assert [path.name for path in (tmp_path / "bucket").iterdir()] == ["answers"]


def test_parts_of_other_settings_or_another_table_are_not_mixed_in(questions: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, questions)
    sample_answers(config, shard=(0, 2), progress=False)
    with pytest.raises(DataError, match="parts of other settings"):
        sample_answers(settings(tmp_path, questions, "temperature=0.5"), progress=False)
    other = questions.with_name("other.jsonl")
    other.write_text("".join(questions.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="another input"):
        sample_answers(settings(tmp_path, other), progress=False)
    assert sample_answers(settings(tmp_path, questions, "batch_size=2"), progress=False).made == 5, "no answer depends on it"


def spoilt(questions: Path, tmp_path: Path, bad: list[int]) -> Path:
    """The questions with some pictures that are none."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    for number, row in enumerate(rows):
        data = b"not a picture" if number in bad else (questions.parent / row["images"][0]).read_bytes()
        (folder / row["images"][0]).write_bytes(data)
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "q.jsonl"


def test_rows_that_cannot_be_used_are_counted_and_listed(questions: Path, tmp_path: Path) -> None:
    manifest = spoilt(questions, tmp_path, [1])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[3]["prompt"] = [{"role": "assistant", "content": "hello"}]
    rows[4]["images"] = ["../../secret.png"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings(tmp_path, manifest)
    found = CliRunner().invoke(app, ["generate", str(tmp_path / "config.yaml")])
    assert found.exit_code == 3, found.output
    assert "undecodable_media" in found.output and "refused.jsonl" in found.output
    listed = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in listed] == [
        ("d1", "undecodable_media"), ("d3", "bad_turns"), ("d4", "missing_media")
    ]  # fmt: skip
    assert len(open_vlm(tmp_path / "out")) == 2


def test_a_table_of_which_nothing_can_be_used_is_an_error_and_can_be_mended(questions: Path, tmp_path: Path) -> None:
    manifest = spoilt(questions, tmp_path, [0, 1, 2, 3, 4])
    config = settings(tmp_path, manifest)
    with pytest.raises(DataError, match=r"none of its 5 rows.*undecodable_media: 5.*the first: id d0"):
        sample_answers(config, progress=False)
    for number in range(5):
        name = f"pictures/{number}.png"
        (manifest.parent / name).write_bytes((questions.parent / name).read_bytes())
    assert sample_answers(config, progress=False).made == 5


def test_clips_go_along_as_frames(tiny_vlm_folder: Callable[[str], Path], tmp_path: Path) -> None:
    frames = []
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(tiny_vlm.picture(number).data or b"")
        frames.append(f"{number}.png")
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Describe what happens in the clip."}]}]
    row = {"id": "c", "prompt": turn, "videos": [{"frames": frames, "fps": 2.0}]}
    (tmp_path / "clips.jsonl").write_text(json.dumps(row) + "\n")
    config = settings(
        tmp_path / "run", tmp_path / "clips.jsonl", "sampler.judges=[]", model=str(tiny_vlm_folder("qwen2_5_vl"))
    )
    sample_answers(config, progress=False)
    clip = open_vlm(tmp_path / "run" / "out")[0].media[0]
    assert isinstance(clip, VideoRef) and clip.fps == 2.0
    assert [frame.data for frame in clip.frames] == [tiny_vlm.picture(number).data for number in range(3)]


def test_a_name_alone_stands_for_a_sampler(questions: Path, tmp_path: Path) -> None:
    settings(tmp_path, questions)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "short.yaml").write_text(re.sub(r"sampler: .*", "sampler: candidates", text))
    assert load_sampling(tmp_path / "short.yaml").sampler.model_dump() == {"name": "candidates", "samples": 4, "judges": ()}
    changed = load_sampling(tmp_path / "short.yaml", ["sampler.samples=2"])
    assert changed.sampler.model_dump()["samples"] == 2
    assert asks_for_answers(tmp_path / "short.yaml") and not asks_for_answers(ROOT / "configs" / "generate" / "tiny.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.name=candidate", "did you mean 'candidates'"),
        ("sampler.samples=1", "samples must be at least 2"),
        ("sampler.judges=[board-f2]", "did you mean 'board-f1'"),
        ("model.name=sd", "is not known"),
        ("temperature=-1", "temperature must not be negative"),
        ("top_p=0", "top_p in"),
        ("rows_per_part=0", "must be at least 1"),
        ("max_rows=0", "max_rows must be at least 1"),
        ("sample=3", "did you mean 'sampler'"),
    ],
)
def test_bad_settings_are_named(override: str, message: str, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings(tmp_path, questions, override)


def test_a_shard_that_does_not_exist_and_a_foreign_class_are_refused(questions: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        sample_answers(settings(tmp_path, questions), shard=(2, 2))
    with pytest.raises(ConfigError, match=r"no subclass of mmalign\.sampling\.base\.AnswerSampler"):
        sample_answers(settings(tmp_path, questions).model_copy(update={"sampler": foreign()}))


def foreign() -> Any:
    """Settings of something that is no sampler."""
    from mmalign.trainers.vlm_sft import VlmSFT

    return VlmSFT.Config(name="mmalign.trainers.vlm_sft:VlmSFT")


def test_the_sampler_on_the_page_works(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "sampling_answers.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(# shout\.py.*?)```", page, re.DOTALL)
    assert found is not None
    (tmp_path / "shout.py").write_text(found[1], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shout", raising=False)
    text = re.sub(r"sampler: .*", "sampler: {name: 'shout:Shout', marks: 2}", _text(tmp_path, questions))
    (tmp_path / "own.yaml").write_text(text)
    sample_answers(load_sampling(tmp_path / "own.yaml"), progress=False)
    table = open_vlm(tmp_path / "out")
    assert table.kind == "pairs" and len(table) == 5
    assert [table[0].answers[0].text + "!!"] == [table[0].answers[1].text] and table[0].meta["sampled"]["loud"] is True


def _text(folder: Path, questions: Path) -> str:
    settings(folder, questions)
    return (folder / "config.yaml").read_text()
