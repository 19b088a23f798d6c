"""The whole page from a made-up run: what it says, that it is self-contained, and what it does about gaps."""

from __future__ import annotations

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmalign.errors import DataError
from mmalign.report import build_report
from mmalign.report.folder import read_lines
from tests.report.made_up import draw

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Text, attributes and nesting of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def run(made_up_run: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(made_up_run, tmp_path / "run"))


def read(run: Path) -> Page:
    return Page(build_report(run).read_text("utf-8"))


def test_complete_page(run: Path) -> None:
    page = read(run)
    assert page.open == []
    summary = json.loads((run / "summary.json").read_text())
    share = f"{100 * summary['win_rate']['mean']:.0f}"
    assert f"The aligned model wins {share} % of 40 prompts against the base (95 % interval" in page.text
    for told in (
        "tiny-judge, a hold-out judge",
        "tiny-clip (training reward)",
        "Both sides became less likely",
        "Step 300",
    ):
        assert told in page.text
    for told in ("truncated_image", "diffusion_dpo", "one shape", "Not picked", "largest gains", "8d09e73", "2.14.1"):
        assert told in page.text
    assert "is not in this run folder" not in page.text


def test_self_contained(run: Path) -> None:
    text = build_report(run).read_text("utf-8")
    page = Page(text)
    assert not page.all("script") and not page.all("link")
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", text) and "@import" not in text and "url(" not in text
    ids = {attributes["id"] for _, attributes in page.found if "id" in attributes}
    assert {(link["href"] or "").removeprefix("#") for link in page.all("a")} <= ids
    assert all(image.get("alt") for image in page.all("img"))


def test_pictures_are_the_models_pixels_side_by_side(run: Path) -> None:
    from mmalign.report import pictures
    from mmalign.report.folder import read_run

    values = pictures.before_after(read_run(run)).values
    card = values["even"][0]
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    assert card.prompt == prompts[0]
    for tile in card.tiles:
        from PIL import Image

        source, _ = pictures.embed(Image.fromarray(draw(prompts, tile.model)[0]))
        assert tile.source == source
    gains = [float(c.change.replace("\u2212", "-")) for c in values["gains"]]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert all(float(c.change.replace("\u2212", "-")) < 0 for c in values["losses"])


def test_everything_from_the_run_is_escaped(run: Path) -> None:
    nasty = "<script>alert(1)</script>\"'&"
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    summary |= {"name": nasty, "method": nasty, "warnings": [nasty]}
    path.write_text(json.dumps(summary))
    (run / "quarantine.jsonl").write_text(json.dumps({"file": nasty, "reason": nasty, "detail": nasty}) + "\n")
    (run / "config.yaml").write_text(f"run: {{name: {json.dumps(nasty)}}}\n{json.dumps(nasty)}: 1\n")
    (run / "environment.json").write_text(json.dumps({nasty: nasty}))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, nasty: i}) + "\n" for i in range(3)))
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    index = json.loads((run / "samples/evaluation/index.json").read_text())
    for row in rows + index["slots"]:
        row["prompt"] = nasty + row["prompt"]
    (run / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "samples/evaluation/index.json").write_text(json.dumps(index))
    text = build_report(run).read_text("utf-8")
    assert "<script" not in text and Page(text).open == []
    assert text.count(html.escape("<script>alert(1)")) > 10


def test_a_run_that_did_not_begin_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a run folder: it has none of checkpoints, config.yaml"):
        build_report(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    page = read(tmp_path)
    assert "This run has no evaluation against the base yet." in page.text and "mmalign evaluate" in page.text
    for name in ("metrics.jsonl", "config.yaml", "environment.json", "quarantine.jsonl", "samples/evaluation"):
        assert f"{name} is not in this run folder" in page.text
    assert not (tmp_path / "summary.json").exists()


def test_damaged_files_are_told_and_the_rest_is_shown(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 301, "lo')
    (run / "environment.json").write_text("{")
    (run / "samples/evaluation/aligned.png").write_bytes(b"no picture")
    (run / "samples/step-00000100/grid.png").write_bytes(b"")
    page = read(run)
    assert "metrics.jsonl has 1 line that is not a JSON object" in page.text
    assert "environment.json is not valid JSON" in page.text
    assert "aligned.png cannot be read" in page.text
    assert "step-00000100/grid.png cannot be shown" in page.text
    assert "Gradient norm" in page.text and "Step 300" in page.text


def test_an_evaluation_of_another_layout_is_told(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    del summary["evaluation"]["models"]
    (run / "summary.json").write_text(json.dumps(summary))
    page = read(run)
    assert "the evaluation in summary.json cannot be read: KeyError 'models'" in page.text
    assert "has no evaluation against the base yet" in page.text


def test_texts_of_language_runs_are_shown(run: Path) -> None:
    (run / "samples/step-00000100/answers.txt").write_text("Q: how many <stars>?\nA: two")
    assert "Q: how many <stars>? A: two" in read(run).text


def test_warnings_reach_a_summary_that_has_none(run: Path) -> None:
    (run / "summary.json").write_text('{"name": "x", "interrupted": true, "steps": 3}')
    build_report(run)
    kept = json.loads((run / "summary.json").read_text())
    assert kept["name"] == "x" and any(text.startswith("It stopped after 3 steps") for text in kept["warnings"])


def test_values_that_are_not_numbers_in_the_log(run: Path) -> None:
    rows = [{"step": i, "loss": None if i == 4 else 0.5, "note": "text"} for i in range(8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = build_report(run).read_text("utf-8")
    assert "loss: not a finite number at step 4" in text and "Not in the log: accuracy, margin" in Page(text).text


def test_no_such_folder_and_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such folder"):
        build_report(tmp_path / "nowhere")
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html/x").touch()
    with pytest.raises(DataError, match="report.html cannot be written"):
        build_report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "summary.json"]


def test_lines_are_strict_where_nobody_can_be_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n[2]\n')
    with pytest.raises(DataError, match="line 3"):
        read_lines(path)
    problems: list[str] = []
    assert read_lines(path, problems) == ({"a": 1},) and len(problems) == 1
    assert read_lines(tmp_path / "none.jsonl") is None
