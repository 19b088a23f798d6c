"""A judge behind an OpenAI-compatible endpoint (vLLM, SGLang and others): bounded concurrency, bounded repetition.

A request that keeps failing, or a reply that cannot be read, is a missing score with a reason; a server that refuses the
caller (a wrong address, model or key), or never answered at all, ends the run.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from mmalign.errors import RewardError
from mmalign.rewards.base import Answers, DirectBackend
from mmalign.rewards.cards import Card
from mmalign.rewards.judge import RATING_QUESTION, check_template, fill, parse_rating, template_record
from mmalign.rewards.table import LoadRequest
from mmalign.rewards.vlm import Question

KEY = "MMALIGN_JUDGE_KEY"
"""Environment variable with the endpoint's key, where it needs one and no other variable is named."""
MAX_ANSWER = 4 * 1024 * 1024
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds between attempts: doubled each time, up to the longest."""
LONGEST_ASKED = 60.0
"""Most seconds a server is given that says how long to stay away (``Retry-After``)."""
READ_AT_ONCE = 1 << 16
REFUSED = (401, 403, 404)
"""Answers no repetition can change for any row."""
LEAST_MASS = 0.5
"""Probability the rating tokens must have together; below it the model was about to say something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the endpoint answered to one question."""

    text: str = ""
    tokens: Mapping[str, float] | None = None
    """Log-probabilities of the likeliest first tokens, where asked for."""
    error: str | None = None
    """Why there is no answer."""
    attempts: int = 1
    cut: bool = False
    """The server says that its limit of tokens ended the answer."""
    is_final: bool = True
    """False where the question might be answered at another time: the server was busy, broken or silent."""


class ApiVlm:
    """A model behind ``POST {url}/chat/completions``. Pictures travel as PNG; temperature is 0.

    Args:
        url: up to and including ``/v1``.
        retries: repetitions after 429, 5xx or silence.
        concurrency: requests under way at once.
        key: sent as a bearer token, never recorded.
    """

    def __init__(self, url: str, model: str, *, timeout: float, retries: int, concurrency: int, key: str = "") -> None:
        if not url.startswith(("http://", "https://")) or not model:
            raise RewardError("name an endpoint as judge-api:http://host:port/v1#model")
        if retries < 0 or concurrency < 1 or not timeout > 0:
            raise RewardError("an endpoint needs retries >= 0, concurrency >= 1 and timeout > 0")
        self.url, self.model, self.timeout, self.retries = url.rstrip("/"), model, timeout, retries
        self.concurrency, self._key, self._answered = concurrency, key, False

    def ask(self, questions: Sequence[Question], *, max_tokens: int, seed: int = 0, top: int = 0) -> list[Said]:
        """One answer per question, in order; `top` > 0 asks for that many log-probabilities of the first token.

        Raises:
            RewardError: the server refuses the caller, or never gave any answer.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda question: self.ask_one(question, max_tokens=max_tokens, seed=seed, top=top), questions))

    def reply(self, questions: Sequence[Question], *, max_tokens: int) -> list[str]:
        """Replies, empty where there is none; for `judge_pairs`."""
        return [said.text for said in self.ask(questions, max_tokens=max_tokens)]

    def ask_one(self, question: Question, *, max_tokens: int, seed: int = 0, top: int = 0) -> Said:
        """One answer; may be called from several threads. Raises as `ask`."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}} for image in question.images
        ]
        content.append({"type": "text", "text": question.text})
        body: dict[str, Any] = {
            "model": self.model, "temperature": 0, "max_tokens": max_tokens, "seed": seed,
            # Servers of models without eyes know plain text alone.
            "messages": [{"role": "user", "content": content if question.images else question.text}],
        }  # fmt: skip
        if top:
            body |= {"logprobs": True, "top_logprobs": top}
        answer, error, attempts = self._post(json.dumps(body).encode())
        if answer is None:
            final = error == "too_long" or (error.startswith("http_4") and error not in ("http_408", "http_429"))
            return Said(error=error, attempts=attempts, is_final=final)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError("no text")
            tokens = _first_tokens(choice) if top else None
        except (ValueError, KeyError, IndexError, TypeError):
            return Said(error="malformed_answer", attempts=attempts)
        return Said(text=text, tokens=tokens, attempts=attempts, cut=choice.get("finish_reason") == "length")

    def _post(self, body: bytes) -> tuple[Any, str, int]:
        """(what the server answered, why there is nothing, attempts). A body that is no JSON was cut on its way, whatever
        length its head promised, and is asked for again."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        last = ""
        for attempt in range(1, self.retries + 2):
            request = urllib.request.Request(f"{self.url}/chat/completions", data=body, headers=headers)
            pause = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)
            try:
                found = self._read(request)
                self._answered = True
                if len(found) > MAX_ANSWER:
                    return None, "too_long", attempt
                return json.loads(found), "", attempt
            except urllib.error.HTTPError as error:
                self._answered = self._answered or error.code not in REFUSED
                last = f"http_{error.code}"
                if error.code in REFUSED:
                    words = error.read(500).decode(errors="replace")
                    raise RewardError(f"{self.url} refuses model '{self.model}': {error.code} {words}") from error
                if error.code not in (408, 429) and error.code < 500:
                    return None, last, attempt
                pause = _asked_pause(error.headers.get("Retry-After"), pause)
            except ValueError:
                last = "malformed_answer"
            except (OSError, http.client.HTTPException) as error:
                last = "no_answer"
                if attempt > self.retries and not self._answered:
                    raise RewardError(f"{self.url} did not answer in {attempt} attempts: {error}") from error
            if attempt <= self.retries:
                time.sleep(pause)
        return None, last, self.retries + 1

    def _read(self, request: urllib.request.Request) -> bytes:
        """The whole answer. A server that sends a byte now and then has `timeout` seconds in all, as a silent one has."""
        end = time.monotonic() + self.timeout
        found = bytearray()
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            while len(found) <= MAX_ANSWER and (block := answer.read1(READ_AT_ONCE)):
                found += block
                if time.monotonic() > end:
                    raise TimeoutError(f"the answer was not complete after {self.timeout} seconds")
        return bytes(found)


class ApiJudge(DirectBackend):
    """A rating from an endpoint: a parsed reply, or (``mode="expected"``) the mean over the rating tokens' probabilities.

    An unreadable reply is asked for again with another seed, `again` times; then it is missing.
    """

    def __init__(
        self, card: Card, vlm: ApiVlm, *, question: str, low: int, high: int, mode: str, max_tokens: int, again: int
    ) -> None:
        check_template(question)
        if mode not in ("expected", "text") or not low < high:
            raise RewardError("a judge's mode is 'expected' or 'text', with low < high")
        self.card, self.vlm, self.question, self.mode = card, vlm, question, mode
        self.low, self.high, self.max_tokens, self.again = low, high, max_tokens, again

    def record(self) -> Mapping[str, Any]:
        return {"url": self.vlm.url, "model": self.vlm.model, "mode": self.mode, "temperature": 0, "transport": "png",
                "ratings": [self.low, self.high], "again": self.again, **template_record(self.question)}  # fmt: skip

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Answers:
        questions = [
            Question(images=(image,), text=fill(self.question, prompt))
            for image, prompt in zip(images, prompts, strict=True)
        ]
        values = [math.nan] * len(questions)
        raw: list[list[dict[str, Any]]] = [[] for _ in questions]
        errors: list[str | None] = [None] * len(questions)
        open_rows = list(range(len(questions)))
        for seed in range(self.again + 1):
            top = 20 if self.mode == "expected" else 0
            said = self.vlm.ask([questions[row] for row in open_rows], max_tokens=1 if top else self.max_tokens,
                                seed=seed, top=top)  # fmt: skip
            unread = []
            for row, one in zip(open_rows, said, strict=True):
                value = self._value(one)
                raw[row].append({"reply": one.text, "attempts": one.attempts, "error": one.error})
                errors[row] = None if value is not None else (one.error or "unparseable")
                if value is not None:
                    values[row] = value
                elif one.error is None:
                    unread.append(row)
            open_rows = unread
            if not open_rows:
                break
        return Answers(values=torch.tensor(values), errors=tuple(errors), raw=tuple(raw))

    def _value(self, said: Said) -> float | None:
        if said.error is not None:
            return None
        if self.mode == "text":
            return parse_rating(said.text, self.low, self.high)
        shares = dict.fromkeys(range(self.low, self.high + 1), 0.0)
        for token, value in (said.tokens or {}).items():
            if token.strip().isdecimal() and int(token) in shares:
                shares[int(token)] += math.exp(value)
        mass = sum(shares.values())
        return sum(rating * share for rating, share in shares.items()) / mass if mass >= LEAST_MASS else None


def judge_api(request: LoadRequest) -> ApiJudge:
    """``judge-api:<url>#<model>``. Options: ``question``, ``low``, ``high``, ``mode``, ``max_tokens``, ``again``, ``timeout``
    seconds, ``retries``, ``concurrency``, and ``key_env``, the environment variable with the key."""
    options = request.take(question=RATING_QUESTION, low=1, high=5, mode="text", max_tokens=64, again=1, timeout=120.0,
                           retries=4, concurrency=8, key_env=KEY)  # fmt: skip
    url, _, model = request.argument.partition("#")
    key_name = options.pop("key_env")
    if key_name != KEY and key_name not in os.environ:
        raise RewardError(f"the environment variable '{key_name}' for the endpoint's key is not set")
    network = {name: options.pop(name) for name in ("timeout", "retries", "concurrency")}
    vlm = ApiVlm(url, model, key=os.environ.get(key_name, ""), **network)
    return ApiJudge(replace(request.card, weights=model), vlm, **options)


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _first_tokens(choice: Mapping[str, Any]) -> dict[str, float]:
    listed = choice["logprobs"]["content"][0]["top_logprobs"]
    found = {str(item["token"]): float(item["logprob"]) for item in listed}
    if any(not math.isfinite(value) and value != -math.inf for value in found.values()):
        raise ValueError("a log-probability is not a number")
    return found


def _asked_pause(text: str | None, ours: float) -> float:
    """The server's wish in seconds, within bounds."""
    return min(float(text), LONGEST_ASKED) if text is not None and text.isdecimal() else ours
