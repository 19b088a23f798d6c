"""From choices on the page to pictures by a personalised run, and nothing when no run was named."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmalign.arena.running import ArenaSettings, open_arena
from mmalign.errors import ConfigError
from mmalign.experiment import train
from tests.arena.arenas import Voter, make_pictures, served
from tests.experiment.test_personalising import CONFIG, overrides, write_votes


def test_four_choices_make_pictures_for_this_person(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    votes = write_votes(tmp_path / "training", {"alice": 6, "bob": 5})
    run = tmp_path / "run"
    train(CONFIG, overrides(tiny_folder("sd1"), votes, run, "optim.lr=0.02"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    source, out = make_pictures(tmp_path / "pictures", prompts=4, each=2), tmp_path / "votes"
    with served(source, out, run=run, prompts=prompts) as server:
        dora = Voter(server.server_address[1], "dora")
        for _ in range(3):
            assert dora.vote("left")[1]["offer"] is None
        early = dora.insist("/api/personalise", {"user": "dora"})
        assert early["state"] == "working"
        deadline = time.monotonic() + 120
        while (said := dora.insist("/api/personalised", {"user": "dora"}))["state"] == "working":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert said["state"] == "failed" and "at least 4" in said["reason"], "three choices are too few, and the person hears it"
        offer = dora.vote("right")[1]["offer"]
        assert offer["here"] and f"personalize {run}" in offer["command"] and f"--prompts {prompts}" in offer["command"]
        dora.insist("/api/personalise", {"user": "dora"})
        while (said := dora.insist("/api/personalised", {"user": "dora"}))["state"] == "working":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert said["state"] == "done" and [one["prompt"] for one in said["pictures"]] == ["a red circle", "a blue star"]
        for one in said["pictures"]:
            status, data, headers = dora.get(one["url"])
            assert status == 200 and headers["Content-Type"] == "image/png" and data.startswith(b"\x89PNG")
    assert "dora" not in " ".join(str(path) for path in (out / "personal").rglob("*"))


def test_without_a_run_the_page_shows_the_command_only(tmp_path: Path) -> None:
    source = make_pictures(tmp_path / "pictures", prompts=3, each=3)
    with served(source, tmp_path / "votes") as server:
        ann = Voter(server.server_address[1], "ann")
        said = [ann.vote("left")[1] for _ in range(4)][-1]
        assert said["offer"]["here"] is False and "mmalign personalize RUN" in said["offer"]["command"]
        code, answer = ann.ask("/api/personalise", {"user": "ann"})
        assert code == 409 and "--run" in answer["error"]
        assert ann.ask("/api/personalised", {"user": "ann"})[1]["state"] == "none"
    absent = ArenaSettings(source=source, out=tmp_path / "v", run=tmp_path, prompts=tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="no such prompt file"), open_arena(absent):
        pass
