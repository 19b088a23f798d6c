"""The page of the arena in a real browser: keys, presses, touch, undo, a kill in the middle, and names that are only text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.arena.arenas import Process, Voter, make_pictures, rows_of, served
from tests.arena.browsers import Page, chromium, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}")

NASTY = "<img src=x onerror=\"document.title='hacked'\"> & <b>prompt</b>"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = make_pictures(tmp_path / "pictures", prompts=4, each=3)
    manifest = folder / "metadata.jsonl"
    manifest.write_text(manifest.read_text().replace("prompt 0", json.dumps(NASTY)[1:-1]))
    return folder


def test_keys_presses_touch_and_undo_become_the_votes_they_say(driver: Any, source: Path, tmp_path: Path) -> None:
    out, name = tmp_path / "votes", 'Zo\u00eb "<script>alert(1)</script>"'
    with served(source, out, goal=10) as server:
        page = Page(driver, server.url + "/")
        page.open(name)
        assert page.text("who") == name and page.text("count") == "0 of 10" and not page.element("undo").is_enabled()
        tickets = [page.press(key) for key in ("1", "2", "0", "s")]
        assert page.text("count") == "3 of 10 (1 tie, 1 skipped)" and not page.shown("offer")
        for side in ("left", "right"):
            page.wait(lambda: page.mark("pair") is not None and page.mark("pair") != page.mark("confirmed"))
            tickets.append(str(page.mark("pair")))
            page.element(side).click()
            page.wait(lambda: page.mark("confirmed") == tickets[-1])
        page.wait(lambda: page.shown("offer"))
        page.element("details").click()
        assert "mmalign personalize RUN --pairs" in page.text("command")
        assert [row["meta"]["choice"] for row in rows_of(out)] == ["left", "right", "tie", "skip", "left", "right"]
        assert [row["id"] for row in rows_of(out)] == tickets
        # Undo by key: the pair comes back and the row is gone.
        before = page.text("prompt"), page.mark("pair")
        driver.find_element("tag name", "body").send_keys("u")
        page.wait(lambda: len(rows_of(out)) == 5 and page.mark("pair") != before[1])
        assert page.text("count") == "4 of 10 (1 tie, 1 skipped)"
        page.press("1")
        # Touch: a press of a picture chooses it, a swipe skips.
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        for gesture, points in (("press", [(0, 0)]), ("swipe", [(0, 0), (-120, 4)])):
            page.wait(lambda: page.mark("pair") is not None and page.mark("pair") != page.mark("confirmed"))
            ticket, box = page.mark("pair"), page.element("right").rect
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.touch("touchStart", (x, y))
            for dx, dy in points[1:]:
                page.touch("touchMove", (x + dx / 2, y + dy / 2))
                page.touch("touchMove", (x + dx, y + dy))
            page.touch("touchEnd")
            page.wait(lambda ticket=ticket: page.mark("confirmed") == ticket)  # type: ignore[misc]
            assert rows_of(out)[-1]["meta"]["choice"] == {"press": "right", "swipe": "skip"}[gesture]
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        # To the end: every pair once, with prompts as text.
        seen = set()
        while page.shown("stage"):
            seen.add(page.text("prompt"))
            page.press("1")
            page.wait(lambda: not page.shown("stage") or page.mark("pair") != page.mark("confirmed"))
        assert page.text("messagetitle") == "That is all" and " ".join(NASTY.split()) in seen
        assert driver.title == "Which do you prefer?" and len(rows_of(out)) == 12
        assert {row["user"] for row in rows_of(out)} == {name}
        loaded = driver.execute_script("return performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)")
        assert set(loaded) == {server.url}
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_vote_given_while_the_server_is_dead_is_sent_when_it_is_back(driver: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "votes"
    arena = Process(source, out)
    page = Page(driver, arena.url)
    page.open("ann")
    confirmed = [page.press("1"), page.press("2")]
    page.wait(lambda: page.mark("pair") not in (None, confirmed[-1]))
    arena.kill()
    waiting = page.mark("pair")
    driver.find_element("tag name", "body").send_keys("1")
    page.wait(lambda: page.shown("trouble"))
    assert "sent again" in page.text("trouble") and page.mark("confirmed") == confirmed[-1]
    driver.find_element("tag name", "body").send_keys("2")  # a second answer to the same pair is not taken
    again = Process(source, out, port=arena.port)
    try:
        page.wait(lambda: page.mark("confirmed") == waiting)
        page.wait(lambda: not page.shown("trouble"))
        rows = rows_of(out)
        assert [row["id"] for row in rows] == [*confirmed, waiting] and rows[-1]["meta"]["choice"] == "left"
        # A vote that was kept by a page that was closed is sent by the next one.
        pair = Voter(again.port, "ann").next()["pair"]
        vote = {"user": "ann", "ticket": pair["ticket"], "key": pair["key"], "choice": "tie", "seconds": 1}
        driver.execute_script("localStorage.setItem('arena.unsent', arguments[0])", json.dumps(vote))
        driver.get(arena.url)
        page.wait(lambda: len(rows_of(out)) == 4)
        assert rows_of(out)[-1]["id"] == pair["ticket"]
    finally:
        again.kill()


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 720)])
def test_everything_needed_fits_the_screen_of_a_phone_and_of_a_desk(
    driver: Any, source: Path, tmp_path: Path, width: int, height: int
) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        with served(source, tmp_path / "votes") as server:
            page = Page(driver, server.url + "/")
            page.open("ann")
            for part in ("left", "right", "tie", "skip", "undo"):
                box = page.element(part).rect
                assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height, part
                assert min(box["width"], box["height"]) >= 44, "large enough for a finger"
            pictures = [page.element(side).rect for side in ("left", "right")]
            assert sum(box["width"] * box["height"] for box in pictures) > 0.5 * width * height
            stacked = pictures[0]["x"] == pictures[1]["x"]
            assert stacked == (width < 700)
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_model_makes_the_offered_pictures_and_a_failure_is_told(driver: Any, source: Path, tmp_path: Path) -> None:
    from mmalign.errors import ModelError

    with served(source, tmp_path / "votes") as server:
        made = source / "0-0.png"

        def work(user: str) -> list[tuple[str, Path]]:
            if user == "bob":
                raise ModelError("no such <b>run</b>")
            return [(NASTY, made), ("second", source / "1-0.png")]

        server.voting.offer.work = work
        page = Page(driver, server.url + "/")
        for user, told in (("ann", "Made for you:"), ("bob", "It did not work: no such <b>run</b>")):
            page.open(user)
            for _ in range(4):
                page.press("1")
            page.wait(lambda: page.shown("offer"))
            page.element("details").click()
            page.element("make").click()
            page.wait(lambda told=told: page.text("making") == told)  # type: ignore[misc]
            figures = driver.find_elements("css selector", "#gallery figure")
            assert [figure.text for figure in figures] == ([NASTY, "second"] if user == "ann" else [])
            widths = "return [...document.querySelectorAll('#gallery img')].every(image => image.naturalWidth > 0)"
            page.wait(lambda widths=widths: driver.execute_script(widths))  # type: ignore[misc]
