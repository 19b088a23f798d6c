"""The arena over HTTP: what is recorded, who is refused, what can be reached, and that a kill loses nothing."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmalign.arena.running import ArenaSettings, greeting, open_arena
from mmalign.arena.server import MAX_BODY
from mmalign.cli.application import app
from mmalign.data import open_table
from mmalign.errors import ConfigError, DataError
from tests.arena.arenas import Process, Voter, make_pictures, rows_of, served


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("source") / "pictures")


def test_choices_ties_and_skips_become_rows_that_our_other_commands_read(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "votes"
    with served(pictures, out) as server:
        ann = Voter(server.server_address[1], "  Ann\u00e9   <b> ")
        shown = {}
        for choice in ("left", "right", "tie", "skip", "left", "right"):
            pair, said = ann.vote(choice, seconds=1.25)
            shown[pair["ticket"]] = (choice, pair, said)
        sides = {
            ticket: [ann.get(pair[side])[1] for side in ("left", "right")] for ticket, (_, pair, _) in shown.items()
        }
    rows = rows_of(out)
    assert [row["id"] for row in rows] == list(shown)
    for row in rows:
        choice, pair, _ = shown[row["id"]]
        left, right = sides[row["id"]]
        chosen, rejected = (out / row["chosen"]).read_bytes(), (out / row["rejected"]).read_bytes()
        assert (chosen, rejected) == ((right, left) if choice == "right" else (left, right))
        assert (row["p_chosen"], row["weight"]) == {"tie": (0.5, 1.0), "skip": (0.5, 0.0)}.get(choice, (1.0, 1.0))
        assert row["user"] == "Ann\u00e9 <b>" and row["prompt"] == pair["prompt"]
        assert row["meta"]["choice"] == choice and row["meta"]["seconds"] == 1.25 and row["meta"]["left"].endswith(".png")
    said = [entry[2] for entry in shown.values()]
    assert [item["progress"]["choices"] for item in said] == [1, 2, 2, 2, 3, 4]
    assert [item["offer"] is not None for item in said] == [False] * 5 + [True]
    assert "--user 'Ann\u00e9 <b>'" in said[-1]["offer"]["command"]
    table = open_table(out)
    assert len(table) == 6 and table[0].user == "Ann\u00e9 <b>"
    done = CliRunner().invoke(app, ["data", "check", str(out / "pairs.jsonl")])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["data", "import", str(out), "--out", str(tmp_path / "table")])
    assert done.exit_code == 0, done.output
    imported = open_table(tmp_path / "table")
    assert [imported[row].weight for row in range(6)] == [1, 1, 1, 0, 1, 1]
    assert imported.meta(0)["choice"] == "left", "provenance survives the import"


def test_no_pair_comes_twice_for_a_user_and_every_prompt_before_a_second_pair_of_any(pictures: Path, tmp_path: Path) -> None:
    with served(pictures, tmp_path / "votes") as server:
        ann, seen, order, held = Voter(server.server_address[1], "ann"), set(), [], []
        for number in range(36):
            pair = ann.next(held)["pair"]
            group, left, right = pair["key"].split(".")
            order.append(group)
            seen.add((group, *sorted((left, right))))
            held.append(pair["key"])
            if number % 3 == 2:  # answered in threes, as a page that reads ahead does
                for key in held:
                    ann.vote("left", {"ticket": f"{number:012x}{held.index(key):012x}", "key": key})
                held = []
        assert len(seen) == 36 and sorted(order[:6]) == sorted(set(order)) and ann.next()["pair"] is None
        assert ann.next()["progress"] == {"choices": 36, "ties": 0, "skips": 0, "goal": 36, "pairs": 36}
        bob = Voter(server.server_address[1], "bob")
        assert bob.next()["pair"]["key"] == bob.next()["pair"]["key"], "unanswered, it is asked again"
        lefts = {int(Voter(server.server_address[1], f"u{n}").next()["pair"]["key"].split(".")[1]) for n in range(24)}
        assert len(lefts) > 1, "the side is drawn"


def test_undo_shows_the_pair_again_and_the_row_is_gone(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "votes"
    with served(pictures, out) as server:
        ann = Voter(server.server_address[1], "ann")
        ann.vote("left")
        pair, _ = ann.vote("right")
        code, said = ann.ask("/api/undo", {"user": "ann", "ticket": pair["ticket"]})
        assert code == 200 and said["undone"] == pair["ticket"] and said["pair"]["key"] == pair["key"]
        assert said["progress"]["choices"] == 1 and said["pair"]["ticket"] != pair["ticket"]
        assert ann.ask("/api/undo", {"user": "ann", "ticket": pair["ticket"]})[1]["undone"] is None, "asked twice, undone once"
        ann.vote("tie", said["pair"])
    assert [row["meta"]["choice"] for row in rows_of(out)] == ["left", "tie"]


def test_a_repeated_vote_counts_once_and_a_changed_one_is_refused(pictures: Path, tmp_path: Path) -> None:
    with served(pictures, tmp_path / "votes") as server:
        ann = Voter(server.server_address[1], "ann")
        pair, _ = ann.vote("left")
        assert ann.vote("left", pair)[1]["progress"]["choices"] == 1
        body = {"user": "ann", "ticket": pair["ticket"], "key": pair["key"], "choice": "right"}
        assert ann.ask("/api/vote", body)[0] == 409
    assert len(rows_of(tmp_path / "votes")) == 1


# ---------------------------------------------------------------------- who is refused


@pytest.fixture(scope="module")
def voter(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with served(pictures, tmp_path_factory.mktemp("refusals") / "votes") as server:
        yield Voter(server.server_address[1], "ann")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "localhost:1", "127.0.0.1.evil.example:{port}",
                                  "10.0.0.7:{port}", "[::ffff:10.0.0.1]:{port}", "", "localhost:{port}@evil",
                                  "127.0.0.1:99999999"])  # fmt: skip
def test_other_host_names_are_refused(voter: Voter, host: str) -> None:
    status, body, _ = voter.get("/", Host=host.format(port=voter.port))
    assert status in (400, 403) and b"<html" not in body


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}"])
def test_this_machines_own_names_are_served(voter: Voter, host: str) -> None:
    assert voter.get("/", Host=host.format(port=voter.port))[0] == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415), ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)  # fmt: skip
def test_posts_that_another_site_could_send_are_refused(voter: Voter, headers: dict[str, str], code: int) -> None:
    assert voter.ask("/api/next", {"user": "ann"}, **headers)[0] == code


def test_our_own_origin_is_taken(voter: Voter) -> None:
    assert voter.ask("/api/next", {"user": "ann"}, Origin=f"http://127.0.0.1:{voter.port}")[0] == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"not json", b"\xff\xfe", b'{"user": 1}', b'{"user": ""}', b'{"user": "a\\u0000b"}', b'{"user": "\\ud800"}',
     json.dumps({"user": "x" * 65}).encode(), json.dumps({"user": "a\u202eb"}).encode(), b'{"user": "ann", "holding": 3}',
     json.dumps({"user": "ann", "holding": ["k"] * 99}).encode(), b"[" * 9000],
)  # fmt: skip
def test_bodies_that_say_nothing_sensible_are_refused_in_words(voter: Voter, body: bytes) -> None:
    code, said = voter.ask("/api/next", body)
    assert code == 400 and said["error"]


@pytest.mark.parametrize(
    ("change", "code"),
    [({"choice": "both"}, 400), ({"ticket": "../../x"}, 400), ({"ticket": 5}, 400), ({"key": "nothing.0.1"}, 404),
     ({"key": "g.0.0"}, 404), ({"key": 7}, 404), ({"key": "a.b.c.d"}, 404), ({"user": "x" * 300}, 400)],
)  # fmt: skip
def test_votes_on_nothing_are_refused(voter: Voter, change: dict[str, Any], code: int) -> None:
    pair = voter.next()["pair"]
    body = {"user": "ann", "ticket": pair["ticket"], "key": pair["key"], "choice": "left", **change}
    assert voter.ask("/api/vote", body)[0] == code
    group = pair["key"].split(".")[0]
    for key in (f"{group}.0.0", f"{group}.0.99", f"{group}.-1.0", f"{group}.0.\u0661"):
        sane = {**body, "user": "ann", "choice": "left", "ticket": pair["ticket"]}
        assert voter.ask("/api/vote", {**sane, "key": key})[0] == 404


def test_large_and_endless_bodies_are_refused_unread(voter: Voter) -> None:
    assert voter.ask("/api/next", {"user": "a" * MAX_BODY})[0] == 413
    assert voter.ask("/api/next", b"", **{"Content-Length": "99999999999999999999"})[0] == 413
    assert voter.ask("/api/next", b"{}", **{"Transfer-Encoding": "chunked"})[0] == 411


@pytest.mark.parametrize("path", ["/../setup.cfg", "/media/../../pairs.jsonl", "/media/%2e%2e%2fpairs.jsonl", "/media/0-0.png",
                                  "/media//etc/passwd", "/pairs.jsonl", "/page/index.html", "/media/", "/api/vote",
                                  "//etc/passwd"])  # fmt: skip
def test_no_path_is_served(voter: Voter, path: str) -> None:
    assert voter.get(path)[0] == 404


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing_inline(voter: Voter) -> None:
    status, body, headers = voter.get("/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    text = body.decode() + voter.get("/arena.css")[1].decode() + voter.get("/arena.js")[1].decode()
    assert "http:" not in text.replace("http://www.w3.org", "") and "https:" not in text and "innerHTML" not in text
    assert "<script>" not in text and "style=" not in text and " onclick" not in text


# ---------------------------------------------------------------------- sources


def test_links_out_of_the_folder_and_broken_pictures_are_never_shown(tmp_path: Path) -> None:
    source = make_pictures(tmp_path / "pictures", prompts=2, each=3)
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), "red").save(secret)
    (source / "0-1.png").unlink()
    (source / "0-1.png").symlink_to(secret)
    (source / "1-2.png").write_bytes(b"no picture")
    with served(source, tmp_path / "votes") as server:
        ann = Voter(server.server_address[1], "ann")
        seen = set()
        while (pair := ann.next()["pair"]) is not None:
            for side in ("left", "right"):
                status, data, _ = ann.get(pair[side])
                assert status == 200
                seen.add(data)
            ann.vote("left", pair)
        assert secret.read_bytes() not in seen and len(seen) == 4
        assert any("lie outside" in note for note in server.voting.catalogue.notes)
        assert len(server.voting.catalogue.broken()) == 1
        # A file that becomes a link afterwards is refused when it is asked for.
        picture = next(item for group in server.voting.catalogue.groups() for item in group.pictures if item.origin == "0-0.png")
        (source / "0-0.png").unlink()
        (source / "0-0.png").symlink_to(secret)
        assert ann.get(f"/media/{picture.key}")[0] == 410


def test_tables_of_pairs_and_of_lists_are_sources_too(pictures: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with served(pictures, first) as server:
        ann = Voter(server.server_address[1], "ann")
        for _ in range(3):
            ann.vote("left")
    with served(first, second) as server:  # the votes of one arena are shown in another
        ann = Voter(server.server_address[1], "bob")
        assert len(server.voting.catalogue) == 3
        for _ in range(3):
            ann.vote("right")
        assert ann.next()["pair"] is None
    with pytest.raises(DataError, match="folder of their own"), open_arena(ArenaSettings(source=first, out=first)):
        pass
    lists = tmp_path / "lists.jsonl"
    images = [{"path": f"pictures/{number}-0.png"} for number in range(3)]
    lists.write_text(json.dumps({"id": "a", "prompt": "p", "images": images}) + "\n")
    (tmp_path / "pictures").symlink_to(pictures)
    settings = ArenaSettings(source=lists, out=tmp_path / "no")
    with pytest.raises(DataError, match="no prompt has two pictures"), open_arena(settings):
        pass  # the link leads out of the manifest's folder
    (tmp_path / "pictures").unlink()
    make_pictures(tmp_path / "pictures", prompts=3, each=1)
    with served(lists, tmp_path / "third") as server:
        assert server.voting.plan.count("ann") == 3 and Voter(server.server_address[1], "ann").next()["pair"]["prompt"] == "p"


def test_sources_without_pairs_and_odd_settings_are_refused(pictures: Path, tmp_path: Path) -> None:
    def opened(source: Path, **settings: Any) -> None:
        with open_arena(ArenaSettings(source=source, out=tmp_path / "votes", **settings)):
            pass

    lone = make_pictures(tmp_path / "lone", prompts=3, each=1)
    with pytest.raises(DataError, match=r"no prompt has two pictures\n.*3 prompts have one picture only"):
        opened(lone)
    (lone / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match="3 pictures have no prompt"):
        opened(lone)
    opened(lone, prompt="one for all")
    with pytest.raises(DataError, match="there is nothing"):
        opened(tmp_path / "absent")
    with pytest.raises(ConfigError, match="--run needs --prompts"):
        opened(pictures, run=tmp_path)
    with pytest.raises(ConfigError, match="YAML source only"):
        opened(pictures, overrides=("seed=1",))
    with pytest.raises(ConfigError, match="cannot listen"):
        opened(pictures, host="192.0.2.1")


def test_listening_beyond_this_machine_is_said_and_takes_stated_names_only(pictures: Path, tmp_path: Path) -> None:
    settings = ArenaSettings(source=pictures, out=tmp_path / "votes", host="0.0.0.0", names=("studio.example",))
    with open_arena(settings) as server:
        port = server.server_address[1]
        assert any("anybody who reaches it" in line for line in greeting(server, settings))
        assert server.knows_host(f"192.168.1.7:{port}") and server.knows_host(f"studio.example:{port}")
        assert not server.knows_host(f"evil.example:{port}")


# ---------------------------------------------------------------------- killed


def test_five_voters_and_a_kill_lose_no_confirmed_vote(tmp_path: Path) -> None:
    source, out = make_pictures(tmp_path / "pictures", prompts=20, each=4), tmp_path / "votes"
    arena = Process(source, out)
    confirmed: dict[str, tuple[str, str]] = {}
    lock, choices = threading.Lock(), ("left", "right", "tie", "skip")

    def vote(name: str) -> None:
        voter = Voter(arena.port, name)
        for number in range(100):
            pair = voter.insist("/api/next", {"user": name, "holding": []})["pair"]
            choice = choices[number % 4]
            body = {"user": name, "ticket": pair["ticket"], "key": pair["key"], "choice": choice}
            said = voter.insist("/api/vote", body)
            with lock:
                confirmed[said["confirmed"]] = (name, choice)

    threads = [threading.Thread(target=vote, args=(f"voter {number}",)) for number in range(5)]
    for thread in threads:
        thread.start()
    while len(confirmed) < 200 and any(thread.is_alive() for thread in threads):
        time.sleep(0.005)
    arena.kill()
    at_kill = dict(confirmed)
    on_disk = {row["id"] for row in rows_of(out)}
    assert set(at_kill) <= on_disk, "a confirmed vote was lost"
    again = Process(source, out, port=arena.port)
    try:
        assert any("going on with" in line for line in again.lines)
        for thread in threads:
            thread.join(timeout=120)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        again.kill()
    rows = rows_of(out)
    assert len(confirmed) == 500 and len(rows) == 500
    assert {row["id"]: (row["user"], row["meta"]["choice"]) for row in rows} == confirmed
    assert len({(row["user"], row["meta"]["pair"]) for row in rows}) == 500, "nobody saw a pair twice"
    assert len(open_table(out)) == 500
