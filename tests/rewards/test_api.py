"""The endpoint judge against a real server on this machine that speaks the chat-completions protocol."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from mmalign import rewards
from mmalign.errors import RewardError
from mmalign.rewards import api
from mmalign.rewards.judge import judge_pairs

Answer = tuple[int, Any, dict[str, str]]


class Endpoint(ThreadingHTTPServer):
    """Answers with what `script` says of (number of the request, its body)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: Callable[[int, dict[str, Any]], Answer] = lambda number, body: says("3")
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"judge-api:http://127.0.0.1:{self.server_address[1]}/v1#tiny"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            status, found, headers = self.server.script(len(self.server.bodies), body)
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status if self.path == "/v1/chat/completions" else 404)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def says(text: Any, **logprobs: float) -> Answer:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if logprobs:
        listed = [{"token": token, "logprob": math.log(share)} for token, share in logprobs.items()]
        choice["logprobs"] = {"content": [{"token": text, "top_logprobs": listed}]}
    return 200, {"choices": [choice]}, {}


def level(body: dict[str, Any]) -> int:
    """The red of the picture in a request."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return int(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).getpixel((0, 0))[0])  # type: ignore[index]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(api, "FIRST_PAUSE", 0.001)
    with Endpoint() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


PICTURES = [Image.new("RGB", (6, 4), (value, 0, 0)) for value in (1, 2, 3, 4)]


def test_ratings_in_order_whatever_the_concurrency(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint.script = lambda number, body: says(f"Final Score: {level(body)}")
    monkeypatch.setenv("A_KEY", "secret")
    scorer = rewards.load(endpoint.name, key_env="A_KEY", question="How {prompt} is it?")
    found = scorer.score(PICTURES, ["red", "a", "b", "c"], details=True)
    assert found.values.tolist() == [1, 2, 3, 4] and set(endpoint.keys) == {"Bearer secret"}
    body = next(body for body in endpoint.bodies if level(body) == 1)
    assert body["messages"][0]["content"][1]["text"] == "How red is it?" and body["temperature"] == 0
    assert body["model"] == "tiny" and "secret" not in json.dumps(dict(scorer.backend.record()))
    assert "question_sha256" in scorer.backend.record() and found.raw[0][0]["reply"] == "Final Score: 1"


def test_unreadable_replies_are_asked_again_then_missing(endpoint: Endpoint) -> None:
    endpoint.script = lambda number, body: says("4" if body["seed"] == 1 and level(body) == 2 else "lovely")
    found = rewards.load(endpoint.name).score(PICTURES[:2], "a", on_error="nan", details=True)
    assert found.errors == ("unparseable", None) and found.values[0].isnan() and found.values[1] == 4
    assert [item["reply"] for item in found.raw[1]] == ["lovely", "4"] and len(endpoint.bodies) == 4


def test_busy_and_broken_servers(endpoint: Endpoint) -> None:
    def script(number: int, body: dict[str, Any]) -> Answer:
        if level(body) == 1:
            return (429, {}, {"Retry-After": "0"}) if number == 1 else says("5")
        return {2: (500, {}, {}), 3: (200, b"<html>", {}), 4: (400, {"error": "too long"}, {})}[level(body)]

    endpoint.script = script
    found = rewards.load(endpoint.name, retries=2, concurrency=1).score(PICTURES, "a", on_error="nan", details=True)
    assert found.errors == (None, "http_500", "malformed_answer", "http_400") and found.values[0] == 5
    assert [item[0]["attempts"] for item in found.raw] == [2, 3, 3, 1]


@pytest.mark.parametrize(
    "content", [None, ["4"], 4, {"text": "4"}], ids=["null", "list", "number", "object"]
)  # fmt: skip
def test_only_text_is_a_reply(endpoint: Endpoint, content: Any) -> None:
    endpoint.script = lambda number, body: says(content)
    assert rewards.load(endpoint.name).score(PICTURES[:1], "a", on_error="nan", details=True).errors == (
        "malformed_answer",
    )


def test_refusals_and_silence_end_the_run(endpoint: Endpoint) -> None:
    endpoint.script = lambda number, body: (401, {"error": "who are you"}, {})
    with pytest.raises(RewardError, match="refuses model 'tiny': 401"):
        rewards.load(endpoint.name).score(PICTURES[:1], "a", on_error="nan")
    with pytest.raises(RewardError, match="did not answer in 2 attempts"):
        rewards.load("judge-api:http://127.0.0.1:9/v1#m", retries=1).score(PICTURES[:1], "a", on_error="nan")
    for name in ("judge-api:tiny", "judge-api:http://127.0.0.1:9/v1"):
        with pytest.raises(RewardError, match="name an endpoint as"):
            rewards.load(name)
    with pytest.raises(RewardError, match="'NO_SUCH_KEY' for the endpoint's key is not set"):
        rewards.load(endpoint.name, key_env="NO_SUCH_KEY")


def test_expected_rating_from_probabilities(endpoint: Endpoint) -> None:
    shares = {1: {"4": 0.5, " 5": 0.25, "5": 0.15, "good": 0.1}, 2: {"The": 0.8, "3": 0.2}}
    endpoint.script = lambda number, body: says("4", **shares[level(body)])
    found = rewards.load(endpoint.name, mode="expected").score(PICTURES[:2], "a", on_error="nan", details=True)
    assert float(found.values[0]) == pytest.approx((4 * 0.5 + 5 * 0.4) / 0.9)
    assert found.errors[1] == "unparseable"  # only a fifth of the probability is on ratings
    assert endpoint.bodies[0]["logprobs"] is True and endpoint.bodies[0]["max_tokens"] == 1


def test_pairs_in_both_orders(endpoint: Endpoint) -> None:
    endpoint.script = lambda number, body: says(f"Image {1 if level(body) > 1 else 2} is better.")
    vlm = api.ApiVlm(endpoint.name.partition(":")[2].partition("#")[0], "tiny", timeout=10, retries=0, concurrency=2)
    found = judge_pairs(vlm, PICTURES[:1], PICTURES[1:2], ["a"])
    assert found.p_first.tolist() == [0.0] and found.consistent.tolist() == [True]
