"""PAL through its commands, on files: fit, score, annotate, new users, measuring, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from mmalign.cli.application import app

PROMPT = "a red circle on a white background"
FIT = ["encoder=tiny-clip", "head.prototypes=2", "head.hidden=16", "optim.lr=0.1", "optim.user_lr=0.2", "optim.epochs=12",
       "optim.batch_size=64", "device=cpu"]  # fmt: skip


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def paint(file: Path, colour: tuple[int, int, int], draw: np.random.Generator) -> None:
    noise = draw.integers(-25, 26, (32, 32, 3))
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(file)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`known/` with red lovers r0-r2 and blue lovers b0-b2, `new/` with rnew and bnew: 24 pairs each, red against blue."""
    folder, draw = tmp_path_factory.mktemp("votes"), np.random.default_rng(0)
    for part, users in (("known", ("r0", "b0", "r1", "b1", "r2", "b2")), ("new", ("rnew", "bnew", "r0"))):
        place = folder / part
        place.mkdir()
        rows = []
        for user in users:
            for number in range(24):
                red, blue = f"{user}-{number}-red.png", f"{user}-{number}-blue.png"
                paint(place / red, (200, 40, 40), draw)
                paint(place / blue, (40, 40, 200), draw)
                chosen, rejected = (red, blue) if user[0] == "r" else (blue, red)
                sides = {"chosen": chosen, "rejected": rejected, "p_chosen": 1.0, "weight": 1.0}
                rows.append({"id": f"{user}-{number}", "prompt": PROMPT, "user": user, **sides})
        (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    skipped = {**rows[0], "id": "skipped", "weight": 0.0, "p_chosen": 0.5}
    nobody = {key: value for key, value in rows[1].items() if key != "user"} | {"id": "nobody"}
    with (folder / "new" / "pairs.jsonl").open("a") as handle:
        handle.write(json.dumps(skipped) + "\n" + json.dumps(nobody) + "\n")
    config = folder / "pal.yaml"
    config.write_text(f"pairs: {folder / 'known'}\nout: {folder / 'pal'}\n")
    done = run("rewards", "fit-pal", config, *FIT)
    assert done.exit_code == 0, done.output
    (folder / "fit.txt").write_text(done.output)
    return folder


def test_a_fit_states_the_encoder_and_one_prototype_beside_it(world: Path) -> None:
    told = (world / "fit.txt").read_text()
    assert "144 pairs of 6 users" in told
    figures = {line.rsplit("  ", 4)[0].strip(): line.split() for line in told.splitlines() if "(" in line and "." in line}
    assert any("encoder" in line for line in told.splitlines()) and "one prototype" in told and "2 prototypes" in told
    assert figures
    assert json.loads((world / "pal" / "single" / "card.json").read_text())["shape"]["prototypes"] == 1
    card = json.loads((world / "pal" / "card.json").read_text())
    assert card["fit"]["split_by"] == "pair" and card["fit"]["figures"]["validation"] > 0.9
    single = json.loads((world / "pal" / "single" / "card.json").read_text())
    assert single["fit"]["figures"]["validation"] < 0.75, "opposite tastes"
    assert "r0" not in str(card["names"])
    again = run("rewards", "fit-pal", world / "pal.yaml", *FIT)
    assert again.exit_code == 2 and "already exists" in again.output


def test_score_reads_the_column_of_users_and_one_user_for_all(world: Path, tmp_path: Path) -> None:
    reward = f"pal:{world / 'pal'}"
    out = tmp_path / "s.parquet"
    done = run("score", world / "known" / "pairs.jsonl", "--reward", f"{reward},tiny-clip", "--image-col", "chosen,rejected",
               "--out", out, "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = pq.read_table(out).to_pylist()
    right = np.mean([row[f"{reward}__chosen"] > row[f"{reward}__rejected"] for row in rows])
    plain = np.mean([row["tiny-clip__chosen"] > row["tiny-clip__rejected"] for row in rows])
    assert right > 0.95 and plain < 0.6
    done = run("score", world / "known" / "pairs.jsonl", "--reward", reward, "--image-col", "chosen,rejected", "--out",
               tmp_path / "r.parquet", "--user", "r0", "--device", "cpu")  # fmt: skip
    rows = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert np.mean([row[f"{reward}__chosen"] > row[f"{reward}__rejected"] for row in rows]) == pytest.approx(0.5, abs=0.05)
    both = run("score", world / "known" / "pairs.jsonl", "--reward", reward, "--user", "r0", "--user-col", "user")
    assert both.exit_code == 2 and "exclude each other" in both.output


def test_unknown_users_fail_their_rows_and_rows_without_one_are_counted(world: Path, tmp_path: Path) -> None:
    reward = f"pal:{world / 'pal'}"
    out = tmp_path / "s.parquet"
    table = world / "new" / "pairs.jsonl"
    done = run("score", table, "--reward", reward, "--image-col", "chosen", "--out", out, "--device", "cpu")
    assert done.exit_code == 3 and "unknown_user 49" in done.output and "users: no_user 1" in done.output
    by_key = {row["key"]: row for row in pq.read_table(out).to_pylist()}
    assert by_key["rnew-0"]["error"] == f"{reward}:unknown_user" and by_key["r0-0"]["error"] in ("", None)


def test_annotate_scores_each_row_for_its_user(world: Path, tmp_path: Path) -> None:
    reward = f"pal:{world / 'pal'}"
    done = run("annotate", world / "known", "--reward", reward, "--out", tmp_path / "a", "--device", "cpu")
    assert done.exit_code == 0, done.output
    rows = pq.read_table(tmp_path / "a" / "part-00000.parquet").to_pylist()
    for name in ("b", "c"):  # filling the store of scores, and reading it: a user is part of what a score is found by
        done = run("annotate", world / "known", "--reward", reward, "--out", tmp_path / name, "--device", "cpu", "--cache",
                   tmp_path / "cache")  # fmt: skip
        assert done.exit_code == 0, done.output
        stored = pq.read_table(tmp_path / name / "part-00000.parquet").to_pylist()
        assert [row["scores"][reward] for row in stored] == [pytest.approx(row["scores"][reward], abs=1e-5) for row in rows]
    assert np.mean([row["scores"][reward][0] > row["scores"][reward][1] for row in rows]) > 0.95


def test_new_users_are_measured_added_and_forgotten(world: Path) -> None:
    pal = world / "pal"
    before = (pal / "head.safetensors").read_bytes()
    done = run("rewards", "test-pal", pal, "--pairs", world / "new", "--shots", "0,4,8", "--device", "cpu")
    assert done.exit_code == 3 and "left out: no_user 1, no_weight 1" in done.output
    lines = {line.split(":")[0].strip(): line for line in done.output.splitlines()}
    new = next(line for line in done.output.splitlines() if line.startswith("  2 prototypes") and "4:" in line)
    single = next(line for line in done.output.splitlines() if line.startswith("  one prototype") and "4:" in line)
    assert float(new.split("4: ")[1].split()[0]) > 0.9 and "(2)" in new and lines
    assert float(single.split("4: ")[1].split()[0]) == pytest.approx(0.5, abs=0.05)
    done = run("rewards", "fit-user", pal, "--pairs", world / "new", "--user", "bnew", "--device", "cpu")
    assert done.exit_code == 0 and "from 24 pairs" in done.output, done.output
    assert (pal / "head.safetensors").read_bytes() == before
    taken = run("rewards", "fit-user", pal, "--pairs", world / "new", "--user", "r0", "--device", "cpu")
    assert taken.exit_code == 2 and "fitted together with the head" in taken.output
    nobody = run("rewards", "fit-user", pal, "--pairs", world / "new", "--user", "zoe", "--device", "cpu")
    assert nobody.exit_code == 2 and "none of its 74 rows is of the user 'zoe'" in nobody.output
    assert run("rewards", "forget-user", pal, "bnew").exit_code == 0
    assert run("rewards", "forget-user", pal, "bnew").exit_code == 2


def test_what_cannot_be_fitted_is_refused_with_the_remedy(world: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'pal'}"
    wrong = run("rewards", "fit-pal", world / "pal.yaml", *FIT, out, "encoder=brightness")
    assert wrong.exit_code == 2 and "pickscore" in wrong.output
    nothing = tmp_path / "pairs.jsonl"
    nothing.write_text(json.dumps({"id": "a", "prompt": PROMPT, "chosen": "x.png", "rejected": "y.png"}) + "\n")
    anonymous = run("rewards", "fit-pal", world / "pal.yaml", *FIT, out, f"pairs={nothing}")
    assert anonymous.exit_code == 2 and "column user" in anonymous.output
    bad = run("rewards", "fit-pal", world / "pal.yaml", "head.prototypes=0", "head.betta=1", out)
    assert bad.exit_code == 2 and "betta" in bad.output
    served = run("rewards", "serve", "--reward", f"pal:{world / 'pal'}", "--port", "0")
    assert served.exit_code == 2 and "#NAME" in served.output
