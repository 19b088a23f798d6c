"""Pictures straight from the embedded model."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mmalign.arena.running import ArenaSettings, open_arena
from mmalign.errors import ConfigError
from tests.arena.arenas import ROOT, Voter, rows_of, served


@pytest.fixture
def config(tmp_path: Path) -> Path:
    made = tmp_path / "generate.yaml"
    made.write_text(
        f"prompts: {ROOT / 'assets/prompts/shapes_held_out.jsonl'}\nmax_prompts: 3\nout: unused\n"
        f"sources:\n  - {{label: tiny sd, model: {{name: sd, path: {ROOT / 'assets/tiny-sd'}}}, candidates: 2, steps: 2}}\n"
    )
    return made


def test_a_model_makes_pairs_while_people_choose_and_its_pictures_are_found_again(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "votes"
    with served(config, out) as server:
        ann = Voter(server.server_address[1], "ann")
        end, prompts = time.monotonic() + 60, []
        while len(prompts) < 3:
            said = ann.next()
            if said["pair"] is None:
                assert said["waiting"] and said["expected"] == 3 and time.monotonic() < end
                time.sleep(0.1)
                continue
            assert ann.get(said["pair"]["left"])[1] != ann.get(said["pair"]["right"])[1]
            ann.vote("left", said["pair"])
            prompts.append(said["pair"]["prompt"])
        last = ann.next()
        assert last["pair"] is None and not last["waiting"] and len(set(prompts)) == 3
    origin = json.loads(rows_of(out)[0]["meta"]["left"])
    assert origin["model"] == "tiny sd" and origin["steps"] == 2 and origin["seed"] > 0
    files = {file: file.stat().st_mtime_ns for file in (out / "live").rglob("*.png")}
    assert len(files) == 6
    with served(config, out) as server:
        deadline = time.monotonic() + 60
        while len(server.voting.catalogue) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert Voter(server.server_address[1], "ann").next()["pair"] is None, "the same pairs, all answered"
    assert {file: file.stat().st_mtime_ns for file in (out / "live").rglob("*.png")} == files


def test_one_picture_a_prompt_is_refused(config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text().replace("candidates: 2", "candidates: 1"))
    with pytest.raises(ConfigError, match="two pictures a prompt"), open_arena(ArenaSettings(source=config, out=tmp_path / "v")):
        pass
