"""Scores rows with several rewards at once, doing nothing twice.

Per window of rows: files are read and identified on threads while earlier windows compute; each distinct picture is
decoded once, resized once per preprocessing id and encoded once per distinct encoder; each distinct prompt likewise. Scores of
a window are collected when the next one is under way, so that a GPU does not wait for that. Knows no file format of tables and
writes nothing.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmalign.media import PLAIN, Colours, Limits
from mmalign.rewards.base import Backend, Details, DirectBackend, EncodingBackend, Texts, User
from mmalign.rewards.batching import EncodeEach, batch_for, in_batches, stack_padded
from mmalign.rewards.decoders import SLOTS_EACH, ProcessDecoders
from mmalign.rewards.decoding import Wanted, whole_picture
from mmalign.rewards.errors import InputError, ScoringError
from mmalign.rewards.inputs import SCORED
from mmalign.rewards.launching import Encoded, Launched, pair_rows, windows
from mmalign.rewards.prefixes import Group, Hashes, group_encoders
from mmalign.rewards.reading import Reader, Window, default_workers
from mmalign.rewards.results import ResultTable
from mmalign.rewards.staging import DeviceResize
from mmalign.rewards.tokens import END, START

AHEAD = 2
"""Windows that are read while one computes: at the end of one, readers without work begin with the next."""
CACHED_VECTORS = 16384
"""Distinct pictures (and prompts) whose embedding vectors are kept between windows."""


@dataclass(slots=True)
class Counters:
    """How often the costly things were done."""

    rows: int = 0
    decoded: int = 0
    images_encoded: dict[str, int] = field(default_factory=dict)
    """By encoder key, the distinct pictures that went through it."""
    blocks_run: int = 0
    """Pictures times blocks of the image towers they went through."""
    blocks_spared: int = 0
    """What `blocks_run` would have been higher by if towers that begin with equal weights had run apart."""
    texts_encoded: dict[str, int] = field(default_factory=dict)
    decode_wait_seconds: float = 0.0


class Engine:
    """Feeds loaded rewards.

    Args:
        backends: the rewards; equal encoders among them are used once.
        workers: threads that read, decode and resize; None: one per core.
        limits: what is too large to decode.
        compile: run image encoders through `torch.compile`, in batches of one fixed size.
        colours: what becomes of transparency and rotation tags.
        decode_workers: processes that decode, beside the threads that feed them; 0: the threads decode. Scores are the same.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        workers: int | None = None,
        limits: Limits = SCORED,
        compile: bool = False,
        colours: Colours = PLAIN,
        decode_workers: int = 0,
    ) -> None:
        self.backends, self.compile = list(backends), compile
        self.graphs: dict[tuple[str, ...], EncodeEach] = {}
        if decode_workers < 0:
            raise InputError(f"decode_workers must be at least 0, got {decode_workers}")
        self.decode_workers, self.limits = decode_workers, limits
        self.workers = max(default_workers() if workers is None else max(1, workers), SLOTS_EACH * decode_workers)
        self.counters = Counters()
        self._vectors: dict[str, OrderedDict[bytes, Tensor]] = {}
        self._texts: dict[str, OrderedDict[str, tuple[tuple[Tensor, ...], bool]]] = {}
        encoders = [backend for backend in self.backends if isinstance(backend, EncodingBackend)]
        self.hashes: Hashes = {}
        self._encoders = {_picture_key(backend): backend for backend in encoders}
        self._groups: dict[str, Group] = {}
        places = {backend.device for backend in encoders}
        only = next(iter(places)) if len(places) == 1 else torch.device("cpu")
        self.reader = Reader(
            {backend.preprocess.key: backend.preprocess for backend in encoders},
            keep_image=any(isinstance(backend, DirectBackend) for backend in self.backends),
            limits=limits, stage=DeviceResize(only) if only.type == "cuda" else None, colours=colours,
            decoders=ProcessDecoders(decode_workers) if decode_workers else None,
        )  # fmt: skip

    def run(
        self,
        images: Sequence[Any],
        prompts: Sequence[str],
        *,
        batch_size: int | None = None,
        on_error: str = "raise",
        embeddings: bool = False,
        progress: Callable[[int], None] | None = None,
        users: Sequence[User] | None = None,
    ) -> dict[str, Details]:
        """Score every row with every reward.

        Args:
            images: one picture per row, of any accepted kind.
            prompts: one text per row.
            batch_size: pictures per forward; None chooses by device. Halved when memory runs out.
            on_error: ``raise``, or ``nan`` to mark rows that cannot be scored and go on.
            progress: called with the number of rows done since the last call.
            users: whose reward each row asks for; None: nobody's in particular.

        Raises:
            ScoringError: a row could not be scored and `on_error` is ``raise``.
        """
        if on_error not in ("raise", "nan"):
            raise InputError(f"on_error is 'raise' or 'nan', got {on_error!r}")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        whose: Sequence[User] = [None] * len(images) if users is None else users
        size = batch_size or self._default_batch()
        results = {backend.name: ResultTable(len(images)) for backend in self.backends}
        spans = windows(len(images), size)
        # Decoded pictures that are kept take much memory, one window ahead of them is enough.
        depth = 1 if self.reader.wanted.keep_image else AHEAD
        with ThreadPoolExecutor(self.workers) as pool, ThreadPoolExecutor(depth) as ahead:
            pending: deque[Future[Window]] = deque()
            running: Launched | None = None

            def read(number: int) -> None:
                if number < len(spans):
                    start, stop = spans[number]
                    pending.append(ahead.submit(self.reader.read, images[start:stop], start, pool))

            for number in range(depth):
                read(number)
            for number, (start, stop) in enumerate(spans):
                asked = time.perf_counter()
                ready = pending.popleft().result()
                self.counters.decode_wait_seconds += time.perf_counter() - asked
                self.counters.decoded += ready.decoded
                read(number + depth)
                started = Launched(window=ready, prompts=prompts[start:stop], users=whose[start:stop])
                self._launch(started, size, on_error, embeddings)
                for finished in (running, started if number + 1 == len(spans) else None):
                    if finished is not None:
                        self._collect(finished, size, results, on_error)
                        self.counters.rows += len(finished.window.digests)
                        if progress is not None:
                            progress(len(finished.window.digests))
                running = started
        return {name: table.details() for name, table in results.items()}

    def _default_batch(self) -> int:
        """On a GPU what half of the free memory holds, on a CPU what its caches like: larger batches are not faster there."""
        devices = {backend.device for backend in self.backends if backend.device.type == "cuda"}
        if not devices:
            return 16
        needed = max((b.bytes_per_image() for b in self.backends if isinstance(b, EncodingBackend)), default=0)
        return batch_for(min(torch.cuda.mem_get_info(device)[0] for device in devices), needed)

    # ------------------------------------------------------------------ scoring

    def _launch(self, started: Launched, size: int, on_error: str, embeddings: bool) -> None:
        """Start the encoders on a window without waiting for a GPU."""
        window, prompts = started.window, started.prompts
        for row, digest in enumerate(window.digests):
            picture = window.pictures[digest]
            if picture.reason is not None and on_error == "raise":
                raise ScoringError(window.start + row, picture.reason, picture.message or "")
        rows = [row for row, digest in enumerate(window.digests) if window.pictures[digest].reason is None]
        started.rows, started.readable = rows, [row for row in rows if _is_text(prompts[row])]
        images: Encoded = {}
        texts: dict[str, tuple[dict[str, int], Texts]] = {}
        for backend in self.backends:
            usable = started.usable(backend)
            if usable and isinstance(backend, EncodingBackend):
                key = _picture_key(backend)
                if key not in images:
                    images.update(self._encode_images(self._group(key), window, rows, size))
                if backend.text_key and backend.text_key not in texts:
                    # Of all rows, not of the usable: another reward with the same texts may know more users.
                    needed = [prompts[row] for row in started.readable]
                    texts[backend.text_key] = self._encode_texts(backend, needed, size)
                started.scored[backend.name] = [
                    pair_rows(
                        backend,
                        started,
                        usable[first : first + size],
                        images[key],
                        texts.get(backend.text_key),
                        embeddings,
                    )
                    for first in range(0, len(usable), size)
                ]
        for device in {backend.device for backend in self.backends if backend.device.type == "cuda"}:
            started.done.append(torch.cuda.Event(blocking=True))
            started.done[-1].record(torch.cuda.current_stream(device))

    def _collect(self, started: Launched, size: int, results: dict[str, ResultTable], on_error: str) -> None:
        """Wait for a window and write its rows into the tables."""
        window, prompts = started.window, started.prompts
        broken = set(started.rows) - set(started.readable)
        for event in started.done:
            event.synchronize()
        for backend in self.backends:
            table, needing = results[backend.name], backend.card.needs_prompt
            for row, digest in enumerate(window.digests):
                picture = window.pictures[digest]
                noted = _prompt_flags(prompts[row]) if needing else ()
                table.set_row(window.start + row, picture.reason, picture.message, picture.flags + noted)
                if needing and row in broken:
                    table.set_row(window.start + row, "bad_prompt", "half a surrogate pair is no text", picture.flags)
            table.note_users(window.start, started.notes.get(backend.name, {}))
            for part in started.scored.get(backend.name, ()):
                table.set_scores(part.rows, part.values, part.truncated)
                if part.vectors is not None:
                    table.set_embeddings(part.rows, part.vectors)
            usable = started.usable(backend)
            if usable and isinstance(backend, DirectBackend):
                _score_direct(backend, window, prompts, usable, size, table, self.reader.wanted)
            if on_error == "raise":
                table.raise_first(window.start, len(window.digests), backend.name)

    def _encode_images(self, group: Group, window: Window, rows: list[int], size: int) -> Encoded:
        """For every member of a group: the row of each picture, and the encodings."""
        first = next(iter(group.members.values()))
        rule = first.preprocess.key
        pictures = {digest: window.pictures[digest] for digest in dict.fromkeys(window.digests[row] for row in rows)}
        by_pixels = {picture.pixel_digests[rule]: picture.pixels[rule] for picture in pictures.values()}
        # Encoders keep different pictures from earlier windows, so each distinct picture has its own list of who needs it.
        needed: dict[tuple[str, ...], list[bytes]] = {}
        known = {
            key: self._vectors.setdefault(_encoder_key(item), OrderedDict()) for key, item in group.members.items()
        }
        for digest in by_pixels:
            needed.setdefault(tuple(key for key in known if digest not in known[key]), []).append(digest)
        made: dict[str, dict[bytes, Tensor]] = {key: {} for key in known}
        for wanted, fresh in needed.items():
            if not wanted:
                continue
            stacks = [by_pixels[digest] for digest in fresh]
            encode = self._compiled(group, wanted) if self.compile else group.encoder(wanted)
            found = in_batches(first, encode, stacks, size, pad=self.compile)
            for digest, several in zip(fresh, found, strict=True):
                for key, feature in zip(wanted, several, strict=True):
                    made[key][digest] = feature
            self._count(group, wanted, len(fresh))
        places = {digest: row for row, digest in enumerate(by_pixels)}
        index = {digest: places[picture.pixel_digests[rule]] for digest, picture in pictures.items()}
        out = {}
        for key, new in made.items():
            features = torch.stack([new[digest] if digest in new else known[key][digest] for digest in by_pixels])
            if features.ndim == 2:  # vectors are small enough to keep; token grids are not
                known[key].update(new)
                while len(known[key]) > CACHED_VECTORS:
                    known[key].popitem(last=False)
            out[key] = index, features
        return out

    def _group(self, key: str) -> Group:
        if not self._groups:  # found at the first picture: hashing large towers takes seconds
            found = group_encoders(self._encoders, self.hashes)
            self._groups = {member: group for group in found for member in group.members}
        return self._groups[key]

    def _count(self, group: Group, wanted: tuple[str, ...], pictures: int) -> None:
        counted = self.counters.images_encoded
        for key in wanted:
            encoder = _encoder_key(group.members[key])
            counted[encoder] = counted.get(encoder, 0) + pictures
        run, spared = group.blocks(wanted)
        self.counters.blocks_run += run * pictures
        self.counters.blocks_spared += spared * pictures

    def _compiled(self, group: Group, wanted: tuple[str, ...]) -> EncodeEach:
        if wanted not in self.graphs:
            self.graphs[wanted] = torch.compile(group.encoder(wanted), dynamic=False)
        return self.graphs[wanted]

    def _encode_texts(
        self, backend: EncodingBackend, prompts: Sequence[str], size: int
    ) -> tuple[dict[str, int], Texts]:
        known = self._texts.setdefault(backend.text_key, OrderedDict())
        distinct = list(dict.fromkeys(prompts))
        fresh = [prompt for prompt in distinct if prompt not in known]
        made: dict[str, tuple[tuple[Tensor, ...], bool]] = {}
        for start in range(0, len(fresh), size):
            part = fresh[start : start + size]
            with torch.inference_mode():
                texts = backend.encode_texts(part)
            for row, prompt in enumerate(part):
                made[prompt] = (tuple(value[row] for value in texts.tensors), bool(texts.truncated[row]))
        self.counters.texts_encoded[backend.text_key] = self.counters.texts_encoded.get(backend.text_key, 0) + len(
            fresh
        )
        found = [made[prompt] if prompt in made else known[prompt] for prompt in distinct]
        tensors = tuple(stack_padded(values) for values in zip(*(item[0] for item in found), strict=True))
        if all(value.ndim == 2 for value in tensors):
            known.update(made)
            while len(known) > CACHED_VECTORS:
                known.popitem(last=False)
        texts = Texts(tensors=tensors, truncated=torch.tensor([item[1] for item in found], dtype=torch.bool))
        return {prompt: row for row, prompt in enumerate(distinct)}, texts


def _encoder_key(backend: EncodingBackend) -> str:
    """Equal keys: equal pixels get one encoding."""
    return f"{backend.image_key}|{backend.mean}|{backend.std}"


def _picture_key(backend: EncodingBackend) -> str:
    """Equal keys: equal pictures get one encoding."""
    return f"{_encoder_key(backend)}|{backend.preprocess.key}"


def _prompt_flags(prompt: str) -> tuple[str, ...]:
    """What a person should know about a prompt; such prompts are scored all the same."""
    empty = ("empty_prompt",) if not prompt.strip() else ()
    return (*empty, "special_token") if any(token in prompt for token in (START, END)) else empty


def _is_text(prompt: str) -> bool:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _score_direct(
    backend: DirectBackend, window: Window, prompts: Sequence[str], rows: list[int], size: int, table: ResultTable,
    wanted: Wanted,
) -> None:  # fmt: skip
    distinct = list(dict.fromkeys((window.digests[row], prompts[row]) for row in rows))
    answers: dict[tuple[bytes, str], tuple[float, str | None, bool, Any]] = {}
    large = [pair for pair in distinct if window.pictures[pair[0]].again is not None]
    others = [pair for pair in distinct if window.pictures[pair[0]].again is None]
    parts = [others[start : start + size] for start in range(0, len(others), size)]
    for part in (*parts, *([pair] for pair in large)):
        images = []
        for digest, _ in part:
            picture = window.pictures[digest]
            image = whole_picture(picture.again, wanted) if picture.again is not None else picture.image
            images.extend([image] if image is not None else [])
        found = backend.answer(images, [prompt for _, prompt in part])
        for index, pair in enumerate(part):
            answers[pair] = (
                float(found.values[index]),
                found.errors[index],
                bool(found.truncated[index]) if found.truncated else False,
                found.raw[index] if found.raw else None,
            )
    for row in rows:
        value, reason, truncated, raw = answers[window.digests[row], prompts[row]]
        at = window.start + row
        table.set_scores([at], torch.tensor([value]), torch.tensor([truncated]))
        if reason is not None:
            table.errors[at], table.messages[at] = reason, f"{backend.name} gave no score: {reason}"
        if raw is not None:
            table.raw.extend([None] * (at + 1 - len(table.raw)))
            table.raw[at] = raw
