"""An HTTP server for loaded rewards: one request at a time on the device, a bounded queue, hard limits on bodies."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable

from mmalign.media import claimed_size
from mmalign.rewards.scorer import ScorerSet
from mmalign.rewards.wire import CARDS, MAX_BODY, MAX_PIXELS, SCORE, WireError, decode_request, encode_answer
from mmalign.serving import Handler, Server

MAX_WAITING = 32
"""Requests that may wait for the device; more are told to come back."""


class RewardServer(Server):
    """Serves ``POST /v1/score`` and ``GET /v1/cards``. Pictures come as bytes only, so no path can be asked for."""

    def __init__(self, scorers: ScorerSet, address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.scorers = scorers
        self.device_lock = threading.Lock()
        self.parse_lock = threading.Lock()
        self.waiting = threading.BoundedSemaphore(MAX_WAITING)


class _Handler(Handler):
    server: RewardServer

    def do_GET(self) -> None:
        if self.path != CARDS:
            self.refuse(404, "there is nothing here")
            return
        cards = {name: card.as_dict() for name, card in self.server.scorers.cards.items()}
        self.answer(200, json.dumps({"cards": cards}).encode())

    def do_POST(self) -> None:
        if self.path != SCORE:
            self.refuse(404, "there is nothing here")
            return
        # A place in the queue is for whole requests: those that come slowly must not keep others from it.
        body = self.body(MAX_BODY)
        if body is None:
            return
        if not self.server.waiting.acquire(blocking=False):
            self.refuse(503, "too many requests are waiting")
            return
        try:
            self._score(body)
        finally:
            self.server.waiting.release()

    def _score(self, body: bytes) -> None:
        try:
            with self.server.parse_lock:  # 64 MiB of brackets become a gigabyte of lists
                request = decode_request(body)
        except WireError as error:
            self.refuse(400, str(error))
            return
        sizes = [claimed_size(image) or (0, 0) for image in request.images]
        if (pixels := sum(width * height for width, height in sizes)) > MAX_PIXELS:
            self.refuse(413, f"the pictures have {pixels} pixels together; send at most {MAX_PIXELS} at a time")
            return
        try:
            with self.server.device_lock:
                found = self.server.scorers.score(list(request.images), list(request.prompts), details=True, on_error="nan")
        except Exception:  # the server goes on, whatever a reward stumbles over; its words are for the one who runs it
            traceback.print_exc()
            self.refuse(500, "scoring failed; the server's output says why")
            return
        self.answer(200, encode_answer(found))


def serve_forever(scorers: ScorerSet, *, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until interrupted."""
    with RewardServer(scorers, (host, port)) as server:
        announce(f"serving {', '.join(scorers.cards)} at {server.url}")
        server.serve_forever()
