"""A judge behind an endpoint that is down, slow, busy or false about lengths: nothing is lost, nothing is paid for twice.

The endpoint is a real server on this machine; it counts every question that it answered in full.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mmalign.branches import Answer, BranchRecord, Message, Part
from mmalign.errors import DataError, RewardError
from mmalign.rewards import api
from mmalign.rewards.answers import judgements, load_judge
from mmalign.rewards.replies import Reply, ReplyStore

GOOD = "[Clinically Significant Errors]:\n(a) False: 1. x\n\n[Matched Findings]:\n3. a; b; c"


class Judge(ThreadingHTTPServer):
    """`script(times this report was asked about, report)` says how to answer; see `Handler`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: Callable[[int, str], dict[str, Any]] = lambda times, report: {}
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"green-api:http://127.0.0.1:{self.server_address[1]}/v1#tiny"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        report = body["messages"][0]["content"].partition("Candidate report:\n")[2].partition("\n")[0]
        with self.server.lock:
            self.server.asked[report] += 1
            how = self.server.script(self.server.asked[report], report)
        choice = {"message": {"content": how.get("text", GOOD)}, "finish_reason": how.get("finish", "stop")}
        data = how.get("body", json.dumps({"choices": [choice]}).encode())
        if how.get("drop"):
            self.connection.close()
            return
        self.send_response(how.get("status", 200))
        for name, value in how.get("headers", {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) + how.get("lie", 0)))
        self.end_headers()
        whole = how.get("status", 200) == 200 and not how.get("lie") and not how.get("drip")
        with self.server.lock:  # before the bytes leave: a test looks as soon as it has them
            self.server.paid[report] += whole
        try:
            for piece in [data] if not how.get("drip") else [data[:1], data[1:2], data[2:3]]:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(how.get("drip", 0))
        except OSError:
            with self.server.lock:
                self.server.paid[report] -= whole

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setattr(api, "FIRST_PAUSE", 0.001)
    with Judge() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def record(name: str) -> BranchRecord:
    prompt = (Message(role="user", parts=(Part(text="Report."),)),)
    return BranchRecord(id=name, messages=prompt, answers=(Answer(text="x"),), meta={"reference": "a clear chest"})


REPORTS = [f"report {number}" for number in range(6)]
RECORDS = [record(report) for report in REPORTS]


def load(server: Judge, replies: Path | None = None, **options: str) -> Any:
    return load_judge(server.name, options={"retries": "3", "timeout": "5", "concurrency": "2", **options}, replies=replies)


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 429, "headers": {"Retry-After": "0"}}, {"status": 500}, {"status": 503}, {"status": 408}, {"drop": True},
        {"body": b'{"choices": [{"mess', "lie": 50}, {"lie": -30},
        {"body": b"<html>overloaded</html>"}, {"body": b'{"choices": [{"mess'}, {"drip": 0.4},
    ],
    ids=["busy", "broken", "down", "timed out", "dropped", "says more", "says less", "a page", "cut body", "dripping"],
)  # fmt: skip
def test_trouble_that_passes_costs_time_alone(server: Judge, trouble: dict[str, Any]) -> None:
    server.script = lambda times, report: trouble if times == 1 and report == "report 1" else {}
    judge = load(server, timeout="0.3" if "drip" in trouble else "5")
    found = judgements(judge, RECORDS, REPORTS)
    assert [one.score for one in found] == [0.75] * 6
    assert server.asked["report 1"] == 2 and sum(server.asked.values()) == 7


def test_a_whole_answer_under_a_false_length_is_an_answer(server: Judge) -> None:
    """Its head promises more than comes, but the body is whole: asking again would pay twice."""
    server.script = lambda times, report: {"lie": 50}
    assert [one.score for one in judgements(load(server), RECORDS, REPORTS)] == [0.75] * 6
    assert set(server.asked.values()) == {1}


def test_an_interrupted_run_goes_on_and_pays_once(server: Judge, tmp_path: Path) -> None:
    """The server dies in the middle: what was answered is kept, and the next run asks for the rest alone."""
    down = {"report 3", "report 5"}
    server.script = lambda times, report: {"status": 503} if report in down else {}
    replies = tmp_path / "kept.jsonl"
    with pytest.raises(RewardError, match=r"http_503 in 4 attempts.*asks only the rest"):
        judgements(load(server, replies, concurrency="1"), RECORDS, REPORTS)
    assert server.paid == Counter({"report 0": 1, "report 1": 1, "report 2": 1})
    assert "report 4" not in server.asked, "a server that is down is left alone"
    down.clear()
    found = judgements(load(server, replies), RECORDS, REPORTS)
    assert [one.score for one in found] == [0.75] * 6
    assert server.paid == Counter(dict.fromkeys(REPORTS, 1))
    before = sum(server.asked.values())
    assert judgements(load(server, replies), RECORDS, REPORTS) == found and sum(server.asked.values()) == before


def test_equal_questions_are_asked_once(server: Judge) -> None:
    assert [one.score for one in judgements(load(server), [*RECORDS[:1]] * 5, ["report 0"] * 5)] == [0.75] * 5
    assert server.paid == Counter({"report 0": 1})


def test_what_no_repetition_mends_is_a_counted_failure(server: Judge, tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "report 0": {"status": 400}, "report 1": {"finish": "length"}, "report 2": {"text": None},
        "report 3": {"text": "I cannot help with that."}, "report 4": {"body": b'"' + b"x" * (api.MAX_ANSWER + 10) + b'"'},
    }  # fmt: skip
    server.script = lambda times, report: ways.get(report, {})
    replies = tmp_path / "kept.jsonl"
    found = judgements(load(server, replies), RECORDS, REPORTS)
    assert [one.reason for one in found] == ["http_400", "cut_reply", "malformed_answer", "no_sections", "too_long", None]
    assert sum(server.asked.values()) == 6
    assert judgements(load(server, replies), RECORDS, REPORTS) == found and sum(server.asked.values()) == 6


def test_a_refused_key_ends_the_run_and_is_written_nowhere(
    server: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "secret-key")
    server.script = lambda times, report: {"status": 401, "body": b"no"} if report == "report 4" else {}
    replies = tmp_path / "kept.jsonl"
    with pytest.raises(RewardError, match="refuses model 'tiny': 401") as found:
        judgements(load(server, replies, key_env="A_KEY", concurrency="1"), RECORDS, REPORTS)
    assert "secret-key" not in str(found.value) + replies.read_text()
    assert len(replies.read_text().splitlines()) == 4


def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "FIRST_PAUSE", 0.001)
    judge = load_judge("green-api:http://127.0.0.1:9/v1#m", options={"retries": "1"}, replies=tmp_path / "kept.jsonl")
    with pytest.raises(RewardError, match="did not answer in 2 attempts"):
        judgements(judge, RECORDS, REPORTS)


def test_a_torn_line_is_cut_away_and_a_damaged_one_named(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    store = ReplyStore(path)
    store.put("one", Reply(text="first", cut=True))
    store.put("two", Reply(text="second ☃", error="http_400"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "three", "text": "th')
    again = ReplyStore(path)
    assert again.get("one") == Reply(text="first", cut=True) and again.get("two") == Reply(text="second ☃", error="http_400")
    assert again.get("three") is None and path.read_bytes() == whole
    again.put("three", Reply(text="third"))
    store.refresh()
    assert store.get("three") == Reply(text="third"), "another process's replies are seen"
    path.write_bytes(b"not json\n" + whole)
    with pytest.raises(DataError, match=r"replies\.jsonl: a line is damaged"):
        ReplyStore(path)


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    stores = [ReplyStore(tmp_path / "replies.jsonl") for _ in range(2)]

    def put(worker: int) -> None:
        for number in range(10):
            stores[worker % 2].put(f"{worker}-{number}", Reply(text="x" * 500 * (number + 1)))

    threads = [threading.Thread(target=put, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ReplyStore(tmp_path / "replies.jsonl")) == 40
