"""The server and its client, over a real socket."""

from __future__ import annotations

import base64
import http.client
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmalign import rewards, serving
from mmalign.errors import RewardError
from mmalign.rewards import remote
from mmalign.rewards import server as server_module
from mmalign.rewards.server import RewardServer
from mmalign.rewards.wire import MAX_BODY
from tests.rewards.test_odd_inputs import encoded


@contextmanager
def serve(clip_folder: Path) -> Iterator[RewardServer]:
    scorers = rewards.load(["tiny-clip", "brightness"], path={"tiny-clip": clip_folder}, device="cpu")
    with RewardServer(scorers, ("127.0.0.1", 0)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def server(clip_folder: Path) -> Iterator[RewardServer]:
    with serve(clip_folder) as running:
        yield running


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


@pytest.fixture
def two_places(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServer]:
    monkeypatch.setattr(serving, "MAX_CONNECTIONS", 2)
    with serve(clip_folder) as running:
        yield running


def knock(server: RewardServer, count: int, words: bytes) -> list[socket.socket]:
    """Clients that say something and no more; all of them have been let in."""
    held = []
    for number in range(count):
        held.append(socket.create_connection(server.server_address[:2], timeout=10))
        held[-1].sendall(words)
        wait_until(lambda number=number: len(server._paces) > number)
    time.sleep(0.05)  # and read
    return held


def wait_until(comes_true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if comes_true():
            return
        time.sleep(0.01)
    pytest.fail("it did not come true")


HEAD = b"POST /v1/score HTTP/1.1\r\n"


@pytest.mark.parametrize("words", [b"P", HEAD + b"X: y", HEAD + b"Content-Length: 9\r\n\r\n{"])
def test_slow_clients_give_way_to_others(two_places: RewardServer, words: bytes) -> None:
    held = knock(two_places, 2, words)
    time.sleep(0.02)
    for _ in range(3):
        assert ask(two_places, b"[]")[0] == 400
    assert held[0].recv(1000) == b"" or b" 400 " in held[0].recv(1000)  # the one that came first was hung up on
    for one in held:
        one.close()


def test_a_newcomer_waits_for_one_that_is_leaving(two_places: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is slow and all places are taken, but one of them is about to be free."""
    monkeypatch.setattr(two_places, "_hang_up", lambda: False)
    held = knock(two_places, 2, b"P")
    threading.Timer(0.3, held[0].close).start()
    assert ask(two_places, b"[]")[0] == 400
    held[1].close()


def test_clients_that_are_being_answered_keep_their_places(
    two_places: RewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, go_on = threading.Semaphore(0), threading.Event()

    def score(*_: object, **__: object) -> None:
        busy.release()
        assert go_on.wait(10)
        raise RuntimeError("enough")

    monkeypatch.setattr(two_places.scorers, "score", score)
    body = json.dumps({"images": [""], "prompts": ["a"]}).encode()
    answers: list[int] = []
    clients = [threading.Thread(target=lambda: answers.append(ask(two_places, body)[0])) for _ in range(2)]
    for client in clients:
        client.start()
    assert busy.acquire(timeout=10)  # one is being scored and the other waits for the device
    wait_until(lambda: sum(not pace.is_reading for pace in two_places._paces.values()) == 2)
    with socket.create_connection(two_places.server_address[:2], timeout=10) as third:
        assert third.recv(10) == b""  # hung up on
    go_on.set()
    for client in clients:
        client.join()
    assert answers == [500, 500]


def test_bodies_that_come_slowly_keep_nobody_from_the_queue(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "waiting", threading.BoundedSemaphore(1))
    held = knock(server, 3, b"POST /v1/score HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
    assert ask(server, json.dumps({"images": [""], "prompts": ["a"]}).encode())[0] == 200
    for one in held:
        one.close()


def test_no_more_bytes_of_bodies_than_memory_is_given(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MAX_HELD", 1000)
    held = knock(server, 1, b"POST /v1/score HTTP/1.1\r\nContent-Length: 990\r\n\r\n" + b" " * 900)
    wait_until(lambda: server._held == 900)
    assert ask(server, b" " * 200)[0] == 503
    held[0].sendall(b" " * 90)
    assert b" 400 " in held[0].recv(1000)  # no JSON; and its bytes are given back
    wait_until(lambda: server._held == 0)
    assert ask(server, b" " * 900)[0] == 400


def test_more_than_a_request_may_hold_goes_in_several(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch, pictures: list[Image.Image]
) -> None:
    scorer = rewards.load(f"remote:{server.url}#brightness")
    many = [picture.resize((8, 8)) for picture in pictures] * 40
    many = [picture.point(lambda value, shift=number: (value + shift) % 256) for number, picture in enumerate(many)]
    expected = rewards.load("brightness").score(many)
    assert len(many) > 256
    assert torch.equal(scorer.score(many, batch_size=len(many)), expected)
    for module in (remote, server_module):
        monkeypatch.setattr(module, "MAX_PIXELS", 5 * 64)
    assert torch.equal(scorer.score(many[:13], batch_size=13), expected[:13])
    body = json.dumps({"images": [base64.b64encode(encoded(many[0])).decode()] * 6, "prompts": [""] * 6})
    status, found = ask(server, body.encode())
    assert status == 413 and "384 pixels" in found["error"]


def test_rows_that_no_server_takes_are_missing_with_a_reason(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch, pictures: list[Image.Image]
) -> None:
    scorer = rewards.load(f"remote:{server.url}#tiny-clip")
    found = scorer.score(pictures[:3], ["a", "x" * 20_001, "b"], details=True, on_error="nan")
    assert found.errors == (None, "prompt_too_long", None) and found.ok.tolist() == [True, False, True]
    monkeypatch.setattr(remote, "MAX_BODY", 2000)
    noise = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    found = scorer.score([pictures[0].resize((8, 8)), noise], "a", details=True, on_error="nan")
    assert found.errors == (None, "too_large")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_client_that_sends_a_huge_body_first_learns_why_it_was_refused(server: RewardServer, is_chunked: bool) -> None:
    length = MAX_BODY + 1
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    pieces = (bytes(1 << 20) for _ in range(length // (1 << 20) + 1))
    if is_chunked:
        connection.request("POST", "/v1/score", pieces, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    else:
        connection.request("POST", "/v1/score", bytes(length))
    assert connection.getresponse().status == (411 if is_chunked else 413)
    connection.close()
    assert ask(server, b"[]")[0] == 400 and server._held < MAX_BODY


def test_what_is_no_request_is_refused_as_json(server: RewardServer) -> None:
    for method, code in (("PUT", 405), ("HEAD", 405), ("BREW", 405)):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
        connection.request(method, "/v1/score")
        answer = connection.getresponse()
        assert answer.status == code and (method == "HEAD" or "error" in json.loads(answer.read()))
        connection.close()
    with socket.create_connection(server.server_address[:2], timeout=10) as odd:
        odd.sendall(b"GET\r\n\r\n")
        assert b" 400 " in odd.recv(1000).splitlines()[0]


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
