"""The server and its client, over a real socket."""

from __future__ import annotations

import base64
import http.client
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmalign import rewards, serving
from mmalign.errors import RewardError
from mmalign.rewards.server import RewardServer
from mmalign.rewards.wire import MAX_BODY
from tests.rewards.test_odd_inputs import encoded


@pytest.fixture
def server(clip_folder: Path) -> Iterator[RewardServer]:
    scorers = rewards.load(["tiny-clip", "brightness"], path={"tiny-clip": clip_folder}, device="cpu")
    with RewardServer(scorers, ("127.0.0.1", 0)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_remote_scores_are_the_local_ones(
    server: RewardServer, clip_folder: Path, pictures: list[Image.Image], prompts: list[str]
) -> None:
    local = rewards.load("tiny-clip", path=clip_folder, device="cpu").score(pictures, prompts)
    scorer = rewards.load(f"remote:{server.url}#tiny-clip")
    torch.testing.assert_close(scorer.score(pictures, prompts, batch_size=3), local, atol=1e-5, rtol=0)
    assert scorer.card.formula == "exp(logit_scale) * cos"
    long = scorer.score(pictures[:1], "a " * 40, details=True)
    assert long.truncated.tolist() == [True]


def ask(
    server: RewardServer, body: bytes, headers: dict[str, str] | None = None, path: str = "/v1/score"
) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.putrequest("POST", path)
    for name, value in (headers if headers is not None else {"Content-Length": str(len(body))}).items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(body)
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"not json", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"[]", "expected an object"),
        (b'{"images": [], "prompts": []}', "0 images and 0 prompts"),
        (b'{"images": ["aGk="], "prompts": ["a", "b"]}', "1 images and 2 prompts"),
        (b'{"images": [[1]], "prompts": ["a"]}', "list of texts"),
        (b'{"images": ["***"], "prompts": ["a"]}', "base64"),
        (b'{"images": ["aGk="], "prompts": ["' + b"x" * 30000 + b'"]}', "characters"),
    ],
)
def test_malformed_requests_are_refused(server: RewardServer, body: bytes, words: str) -> None:
    status, found = ask(server, body)
    assert status == 400 and words in found["error"]


def test_limits(server: RewardServer) -> None:
    assert ask(server, b"", {"Content-Length": str(1_000_000_000)})[0] == 413
    assert MAX_BODY < 1_000_000_000
    assert ask(server, b"", {})[0] == 411
    assert ask(server, b"{}", path="/../etc/passwd")[0] == 404
    status, found = ask(
        server, b'{"images": ["L2V0Yy9wYXNzd2Q="], "prompts": ["a"]}'
    )  # base64 of a path: only bytes count
    assert status == 200 and found["rewards"]["brightness"] == {
        "scores": [None], "errors": ["unsupported_format"], "truncated": [False],
    }  # fmt: skip


def test_odd_bodies_and_prompts_do_no_harm(server: RewardServer) -> None:
    assert ask(server, b"5\r\nhello\r\n0\r\n\r\n", {"Transfer-Encoding": "chunked"})[0] == 411
    assert ask(server, b"{}", {"Content-Length": "2", "Transfer-Encoding": "chunked"})[0] == 411
    for length in ("-1", "2e9", "0x10", "9" * 40, " ", "1,1"):
        assert ask(server, b"{}", {"Content-Length": length})[0] in (411, 413)
    assert ask(server, b"\xff\xfe{")[0] == 400
    assert ask(server, b'{"images": [' + b"9" * 5000 + b'], "prompts": ["a"]}')[0] == 400
    picture = base64.b64encode(encoded(Image.new("RGB", (9, 9)))).decode()
    body = json.dumps({"images": [picture] * 3, "prompts": ["\ud800 half a pair", "<|endoftext|>", "x " * 5000]})
    status, found = ask(server, body.encode())
    one = found["rewards"]["tiny-clip"]
    assert status == 200 and one["errors"] == ["bad_prompt", None, None] and one["scores"][0] is None
    assert one["truncated"] == [False, False, True]


def test_a_body_that_never_comes_to_its_end_loses_its_place(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "BODY_TIMEOUT", 0.2)
    with socket.create_connection(server.server_address[:2], timeout=10) as slow:
        slow.sendall(b"POST /v1/score HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        answer = b""
        while not answer:
            slow.sendall(b" ")
            ready, _, _ = select.select([slow], [], [], 0.05)
            answer = slow.recv(4096) if ready else b""
    assert b" 408 " in answer.splitlines()[0]
    assert ask(server, b"[]")[0] == 400  # and the next is served


def test_no_more_clients_than_there_are_places(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_places", threading.BoundedSemaphore(2))
    held = [socket.create_connection(server.server_address[:2], timeout=10) for _ in range(2)]
    for one in held:  # a first byte, so that both have been let in
        one.sendall(b"P")
    time.sleep(0.2)
    with socket.create_connection(server.server_address[:2], timeout=10) as third:
        assert third.recv(10) == b""  # hung up on
    for one in held:
        one.close()
    for _ in range(100):
        try:
            assert ask(server, b"[]")[0] == 400
            break
        except (http.client.HTTPException, ConnectionError):
            time.sleep(0.05)
    else:
        pytest.fail("places are not given back")


def test_a_reward_that_breaks_down_is_a_500_and_the_server_goes_on(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    picture = base64.b64encode(encoded(Image.new("RGB", (9, 9)))).decode()
    body = json.dumps({"images": [picture], "prompts": ["a"]}).encode()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret place /srv/weights")

    with monkeypatch.context() as patch:
        patch.setattr(server.scorers, "score", broken)
        status, found = ask(server, body)
    assert status == 500 and "secret" not in str(found)
    assert ask(server, body)[0] == 200


def test_a_silent_server_ends_the_run(pictures: list[Image.Image]) -> None:
    with pytest.raises(RewardError, match="did not answer"):
        rewards.load("remote:http://127.0.0.1:9", timeout=1.0)
