"""What a scoring server and its client say to each other: JSON with lossless pictures. Never pickle, never paths."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

MAX_BODY = 64 * 1024 * 1024
"""Bytes of a request; larger ones are refused before they are read."""
MAX_IMAGES = 256
MAX_PIXELS = 1 << 28
"""Of all pictures of a request, when decoded: a few kilobytes of PNG can claim a hundred million."""
MAX_PROMPT = 20_000
"""Characters."""
SCORE, CARDS = "/v1/score", "/v1/cards"


class WireError(ValueError):
    """A message that does not have the agreed form; the text is meant for the other side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Pictures (encoded files) with one prompt each."""

    images: tuple[bytes, ...]
    prompts: tuple[str, ...]


def encode_request(images: list[Image.Image], prompts: list[str]) -> bytes:
    """A request body; pictures travel as PNG."""
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return json.dumps({"images": encoded, "prompts": prompts}).encode()


def decode_request(body: bytes) -> Request:
    """The request in a body.

    Raises:
        WireError: not JSON, other fields, wrong types, too many pictures, or lengths that differ.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError("the body is not JSON") from error
    if not isinstance(found, dict) or set(found) != {"images", "prompts"}:
        raise WireError("expected an object with exactly 'images' and 'prompts'")
    images, prompts = found["images"], found["prompts"]
    for name, value in (("images", images), ("prompts", prompts)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise WireError(f"'{name}' must be a list of texts")
    if len(images) != len(prompts) or not 1 <= len(images) <= MAX_IMAGES:
        raise WireError(f"{len(images)} images and {len(prompts)} prompts; expected as many, 1 to {MAX_IMAGES}")
    if max(len(text) for text in prompts) > MAX_PROMPT:
        raise WireError(f"a prompt is longer than {MAX_PROMPT} characters")
    try:
        data = tuple(base64.b64decode(item, validate=True) for item in images)
    except (binascii.Error, ValueError) as error:
        raise WireError("'images' must be base64") from error
    return Request(images=data, prompts=tuple(prompts))


def encode_answer(details: Mapping[str, Any]) -> bytes:
    """Scores, reasons and cut prompts of every reward; a score that is not there is null."""
    answer = {
        name: {
            "scores": [None if math.isnan(value) else value for value in found.values.tolist()],
            "errors": list(found.errors),
            "truncated": found.truncated.tolist(),
        }
        for name, found in details.items()
    }
    return json.dumps({"rewards": answer}).encode()


def decode_answer(body: bytes, reward: str, count: int) -> tuple[list[float], list[str | None], list[bool]]:
    """Scores (NaN where missing), reasons and cut flags of one reward.

    Raises:
        WireError: not what a server of ours would say.
    """
    try:
        found = json.loads(body)["rewards"][reward]
        scores = [math.nan if value is None else float(value) for value in found["scores"]]
        errors = [None if value is None else str(value) for value in found["errors"]]
        truncated = [bool(value) for value in found["truncated"]]
    except (ValueError, KeyError, TypeError) as error:
        raise WireError(f"the server's answer has no scores of '{reward}'") from error
    if not len(scores) == len(errors) == len(truncated) == count:
        raise WireError(f"the server answered {len(scores)} scores for {count} pictures")
    if any(math.isnan(value) and reason is None for value, reason in zip(scores, errors, strict=True)):
        raise WireError("the server left out a score without a reason")
    return scores, errors, truncated
