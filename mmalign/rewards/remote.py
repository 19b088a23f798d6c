"""A reward that another machine computes: ``remote:http://host:8321``, or with a reward's name ``...#pickscore``."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from PIL import Image

from mmalign.errors import RewardError
from mmalign.rewards.base import Answers, DirectBackend
from mmalign.rewards.cards import Card
from mmalign.rewards.table import LoadRequest
from mmalign.rewards.wire import (
    CARDS,
    MAX_BODY,
    MAX_IMAGES,
    MAX_PIXELS,
    MAX_PROMPT,
    SCORE,
    WireError,
    decode_answer,
    encode_request,
)

MAX_ANSWER = 64 * 1024 * 1024


class Remote(DirectBackend):
    """Sends pictures losslessly, as many at a time as a server takes; one that stays away ends the run instead of giving scores
    that are none. A row that no server takes (above `MAX_PROMPT`, or a PNG above `MAX_BODY`) is missing with a reason."""

    def __init__(self, card: Card, url: str, reward: str, *, timeout: float, retries: int) -> None:
        self.card, self.url, self.reward, self.wait, self.retries = card, url, reward, timeout, retries

    def record(self) -> Mapping[str, Any]:
        return {"url": self.url, "reward": self.reward, "transport": "png"}

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Answers:
        errors: list[str | None] = ["prompt_too_long" if len(prompt) > MAX_PROMPT else None for prompt in prompts]
        values, truncated = [math.nan] * len(images), [False] * len(images)
        rows = [row for row, reason in enumerate(errors) if reason is None]
        open_parts = [rows] if rows else []
        while open_parts:
            part = open_parts.pop()
            pixels = sum(images[row].width * images[row].height for row in part)
            is_one = len(part) == 1
            body = b""
            if is_one or (len(part) <= MAX_IMAGES and pixels <= MAX_PIXELS):
                body = encode_request([images[row] for row in part], [prompts[row] for row in part])
            if not body or (len(body) > MAX_BODY and not is_one):
                open_parts += [part[len(part) // 2 :], part[: len(part) // 2]]
            elif len(body) > MAX_BODY:
                errors[part[0]] = "too_large"
            else:
                for row, value, reason, cut in zip(part, *self._ask(body, len(part)), strict=True):
                    values[row], errors[row], truncated[row] = value, reason, cut
        return Answers(values=torch.tensor(values), errors=tuple(errors), truncated=tuple(truncated))

    def _ask(self, body: bytes, count: int) -> tuple[list[float], list[str | None], list[bool]]:
        try:
            return decode_answer(self._post(body), self.reward, count)
        except WireError as error:
            raise RewardError(f"{self.url}: {error}") from error

    def _post(self, body: bytes) -> bytes:
        return fetch(f"{self.url}{SCORE}", body, timeout=self.wait, retries=self.retries)


def fetch(url: str, body: bytes | None, *, timeout: float, retries: int) -> bytes:
    """One request with bounded repetition; 4xx answers are final, 5xx and silence are tried again with a pause.

    Raises:
        RewardError: the server refused, or did not answer in `retries` + 1 attempts.
    """
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    last = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(0.2 * 2**attempt, 5.0))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return bytes(answer.read(MAX_ANSWER))
        except urllib.error.HTTPError as error:
            last = f"{error.code}: {error.read(2000).decode(errors='replace')}"
            if error.code < 500:
                break
        except OSError as error:
            last = str(error)
    raise RewardError(f"{url} did not answer: {last}")


def remote(request: LoadRequest) -> Remote:
    """Connect to a server. Options: ``timeout`` seconds, ``retries``."""
    options = request.take(timeout=60.0, retries=3)
    url, _, reward = request.argument.partition("#")
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise RewardError("name a server as remote:http://host:port, or remote:http://host:port#reward")
    try:
        cards = json.loads(fetch(f"{url}{CARDS}", None, timeout=options["timeout"], retries=0))["cards"]
        known = {name: {f.name: card[f.name] for f in fields(Card) if f.name in card} for name, card in cards.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise RewardError(f"{url} is not a scoring server") from error
    if not reward and len(known) == 1:
        reward = next(iter(known))
    if reward not in known:
        raise RewardError(f"{url} serves {', '.join(known)}; name one as remote:{url}#NAME")
    card = replace(Card(**known[reward]), name=request.name, differentiable=False)
    return Remote(card, url, reward, timeout=float(options["timeout"]), retries=int(options["retries"]))
