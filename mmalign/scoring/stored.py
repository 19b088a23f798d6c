"""Scores and picture embeddings that are computed once: the cache kinds ``scores`` and ``clip``.

A score is found by the picture's content and the prompt, an embedding by the picture alone. The cache's folder is named by
all that decides the numbers (the reward's card, its weights' hash, precision, colour policy, this version), so that another
revision or precision never meets old numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign import __version__
from mmalign.data.cache import Cache
from mmalign.data.cachewriter import ShardWriter
from mmalign.errors import DataError
from mmalign.media import PLAIN, Colours, Limits, MediaError, read_bytes
from mmalign.rewards import Backend, ScorerSet
from mmalign.rewards.inputs import SCORED
from mmalign.types import ImageRef

SHARD_BYTES, SHARD_SECONDS = 64 << 20, 120.0


def identity(backend: Backend, *, compiled: bool = False, colours: Colours = PLAIN) -> dict[str, Any]:
    """Everything that decides a reward's numbers: card, weights, options, precision, this version."""
    return {
        "card": backend.card.as_dict(), "record": dict(backend.record()), "version": __version__, "colour": colours.name,
        "compiled": compiled,
    }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one reward says of some pictures, stored before or computed now."""

    values: Tensor  # [n] float32, NaN where there is no score
    errors: tuple[str | None, ...]
    messages: tuple[str | None, ...]


class StoredScores:
    """A set of rewards in front of which a cache stands.

    Args:
        scorers: loaded rewards.
        root: folder of all caches.
        embeddings: keep the pictures' embeddings (kind ``clip``) and no scores.

    Raises:
        DataError: a reward has no embedding of pictures.
    """

    def __init__(self, scorers: ScorerSet, root: str | Path, *, embeddings: bool = False, limits: Limits = SCORED) -> None:
        self.scorers, self.embeddings, self.limits = scorers, embeddings, limits
        self.kind = "clip" if embeddings else "scores"
        self.computed = 0
        """(picture, reward) that were computed, not read, since this object was made."""
        colours = scorers.engine.reader.colours
        self.caches = {
            backend.name: Cache.open_or_create(root, self.kind, _plain(identity(backend, colours=colours)))
            for backend in scorers.backends
        }
        self._writers = {name: self._writer(name) for name in self.caches}
        self._fresh: dict[str, dict[str, Tensor]] = {name: {} for name in self.caches}

    def score(
        self, images: Sequence[ImageRef], prompts: Sequence[str], *, batch_size: int | None = None,
        users: Sequence[str | None] | None = None,
    ) -> dict[str, Found]:  # fmt: skip
        """What every reward says of each picture with its prompt (for its user, where the reward differs between people); what is
        new is stored with the next shard.

        Raises:
            DataError: `embeddings` was asked of this store, or of a reward that has none.
        """
        if self.embeddings:
            raise DataError("this store keeps embeddings; make one without `embeddings` for scores")
        return self._all(images, prompts, batch_size, users)

    def fill(
        self, images: Sequence[ImageRef], prompts: Sequence[str], *, batch_size: int | None = None,
        users: Sequence[str | None] | None = None,
    ) -> dict[str, Found]:  # fmt: skip
        """As `score`, whatever is kept; the values of embeddings are NaN."""
        return self._all(images, prompts, batch_size, users)

    def gather(self, reward: str, images: Sequence[ImageRef]) -> Tensor:
        """Stored embeddings of some pictures. [n, D] float32

        Raises:
            DataError: one is not stored. MediaError: a picture cannot be read.
        """
        self.flush()
        return self.caches[reward].gather([self._digest(image) for image in images])["image"]

    def flush(self) -> None:
        """Write what is not stored yet."""
        for name, writer in self._writers.items():
            writer.flush()
            self._fresh[name] = {}
            self.caches[name].refresh()

    def _all(
        self, images: Sequence[ImageRef], prompts: Sequence[str], batch_size: int | None, users: Sequence[str | None] | None
    ) -> dict[str, Found]:
        digests, broken = self._digests(images)
        whose = [None] * len(images) if users is None else users
        found: dict[str, Found] = {}
        for backend in self.scorers.backends:
            name = backend.name
            keys = [None if digest is None else self._key(backend, digest, prompt, user)
                    for digest, prompt, user in zip(digests, prompts, whose, strict=True)]  # fmt: skip
            values = [float("nan")] * len(keys)
            errors: list[str | None] = [None if error is None else error[0] for error in broken]
            messages: list[str | None] = [None if error is None else error[1] for error in broken]
            places: dict[str, list[int]] = {}
            for place, key in enumerate(keys):
                if key is not None:
                    places.setdefault(key, []).append(place)
            missing = set(self.caches[name].missing(list(places))) - set(self._fresh[name])
            for key, own in places.items():
                if key in missing:
                    continue
                stored = self._fresh[name].get(key)
                value = stored if stored is not None else self.caches[name].gather([key])[self._tensor][0]
                for place in own:
                    values[place] = float("nan") if self.embeddings else float(value)
            self._compute(backend, images, (prompts, whose), {key: places[key] for key in places if key in missing},
                          values, errors, messages, batch_size)  # fmt: skip
            found[name] = Found(values=torch.tensor(values), errors=tuple(errors), messages=tuple(messages))
        return found

    def _compute(
        self, backend: Backend, images: Sequence[ImageRef],
        prompts_and_users: tuple[Sequence[str], Sequence[str | None]], places: Mapping[str, list[int]],
        values: list[float], errors: list[str | None], messages: list[str | None], batch_size: int | None,
    ) -> None:  # fmt: skip
        """Ask one reward about the pictures at these places, and keep what it says that is a number."""
        if not places:
            return
        prompts, users = prompts_and_users
        keys, first = list(places), [own[0] for own in places.values()]
        engine = self.scorers.engine
        made = ScorerSet([backend], workers=engine.workers, limits=self.limits, colours=engine.reader.colours)
        made.engine.reader.decoders = engine.reader.decoders
        details = made.engine.run(
            [images[place] for place in first], [prompts[place] for place in first], batch_size=batch_size, on_error="nan",
            embeddings=self.embeddings, users=[users[place] for place in first],
        )[backend.name]  # fmt: skip
        if self.embeddings and details.embeddings is None:
            raise DataError(f"reward '{backend.name}' has no embedding of pictures; kind 'clip' needs one of the CLIP type")
        self.computed += len(keys)
        good = [number for number in range(len(keys)) if details.errors[number] is None]
        for number, key in enumerate(keys):
            for place in places[key]:
                values[place] = float("nan") if self.embeddings else float(details.values[number])
                errors[place], messages[place] = details.errors[number], details.messages[number]
        if good:
            source = details.embeddings if self.embeddings else details.values
            assert source is not None
            kept = source[torch.tensor(good)].float()
            self._writers[backend.name].add([keys[number] for number in good], {self._tensor: kept})
            if not self._writers[backend.name].keys:  # it has just written a shard
                self.caches[backend.name].refresh()
                self._fresh[backend.name] = {}
            else:
                self._fresh[backend.name].update(zip([keys[number] for number in good], kept, strict=True))

    @property
    def _tensor(self) -> str:
        return "image" if self.embeddings else "score"

    def _writer(self, name: str) -> ShardWriter:
        cache = self.caches[name]
        return ShardWriter(folder=cache.folder, shard_bytes=SHARD_BYTES, shard_seconds=SHARD_SECONDS, known=cache.kinds)

    def _key(self, backend: Backend, digest: str, prompt: str, user: str | None) -> str:
        if self.embeddings:
            return digest
        whose = [backend.user_key(user)] if backend.reads_user else []
        return "\n".join([digest, *whose, *([prompt] if backend.card.needs_prompt else [])])

    def _digest(self, image: ImageRef) -> str:
        return hashlib.sha256(read_bytes(image, self.limits)[0]).hexdigest()

    def _digests(self, images: Sequence[ImageRef]) -> tuple[list[str | None], list[tuple[str, str] | None]]:
        digests: list[str | None] = []
        broken: list[tuple[str, str] | None] = []
        for image in images:
            try:
                digests.append(self._digest(image))
                broken.append(None)
            except MediaError as error:
                digests.append(None)
                broken.append((error.reason, error.detail))
        return digests, broken


def fill_table(
    store: StoredScores, table: Any, rows: Sequence[int], *, batch_size: int | None = None,
    advance: Callable[[int], None] = lambda _: None, window: int = 256,
) -> int:  # fmt: skip
    """Store what rewards say of all pictures of some rows of a table of pairs or lists; returns how many cannot be scored."""
    failed = 0
    for start in range(0, len(rows), window):
        some = [table[int(row)] for row in rows[start : start + window]]
        images = [image for record in some for image in pictures_of(record)]
        prompts = [record.prompt for record in some for _ in pictures_of(record)]
        users = [record.user for record in some for _ in pictures_of(record)]
        found = store.fill(images, prompts, batch_size=batch_size, users=users)
        failed += sum(error is not None for one in found.values() for error in one.errors)
        advance(len(some))
    store.flush()
    return failed


def pictures_of(record: Any) -> tuple[ImageRef, ...]:
    """The pictures of a row of pairs or of a list."""
    return tuple(record.images) if hasattr(record, "images") else (record.chosen, record.rejected)


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """As JSON values: cards hold paths and tuples."""
    import json

    return dict(json.loads(json.dumps(facts, sort_keys=True, default=str)))
