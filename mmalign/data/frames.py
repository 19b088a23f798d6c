"""Sampled frames of clips, decoded once and kept: the cache kind ``frames``.

An entry is what one sampler took of one clip: frames as they came out of the decoder, bit for bit, their times and numbers,
and what was special about the file. It is found by the clip's content, so a renamed file is known and a changed one is not.
Reordered or thinned clips (`mmalign.media.perturbed`) are index operations on an entry, `Frames.take`, and need none of their
own. Not for deciding which frames a model sees.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from mmalign.data.cache import Cache
from mmalign.data.files import file_hash, write_json
from mmalign.data.progress import progress_bar
from mmalign.media import DEFAULT, Frames, Limits, MediaError, Sampler, decode_video, require_decoder, video_fields
from mmalign.types import ImageRef

if TYPE_CHECKING:
    from filelock import BaseFileLock

KIND: Final = "frames"
VERSION: Final = 1
FLUSH_BYTES: Final = 64 << 20
FLUSH_CLIPS: Final = 128
"""Most clips that wait for a shard: each of them holds an open lock file."""
FLUSH_SECONDS: Final = 20.0
WAIT_SECONDS: Final = 60.0
"""How long a clip is waited for that another process is decoding, before it is decoded here as well."""


class FrameCache:
    """Frames of clips by (content, sampler, size). Safe to use from threads, and by several processes at once.

    A clip that one thread or process is decoding is waited for by the others (a lock per entry, held until it is stored): it is
    decoded once whoever asks. Where locks do not work or a process keeps one for a minute, it is decoded twice and stored once.

    Args:
        root: folder of all caches.
        max_side: longer side in pixels to which frames are reduced before they are stored; None: as they are.
        trust_mtime: take a file that has the size and the time of one that was hashed before for the same file, instead of
            reading it again.
        flush_bytes: decoded frames that are held in memory before a shard is written.
        decoder: ``pyav`` or ``torchcodec``; entries of one are not read with the other.

    Raises:
        DataError, MissingExtraError: the folder cannot be written, or the decoder cannot be used.
    """

    def __init__(
        self, root: str | Path, *, max_side: int | None = None, trust_mtime: bool = False, flush_bytes: int = FLUSH_BYTES,
        limits: Limits = DEFAULT, decoder: str = "pyav",
    ) -> None:  # fmt: skip
        require_decoder(decoder)
        self.root, self.max_side, self.trust_mtime, self.limits = Path(root), max_side, trust_mtime, limits
        self.decoder = decoder
        self.decoded = 0
        """Clips that were decoded, not read, since this object was made."""
        self._flush_bytes = flush_bytes
        self._lock = threading.Lock()
        self._caches: dict[tuple[str, int], Cache] = {}
        self._pending: dict[tuple[str, int], dict[str, Frames]] = {}
        self._pending_bytes = 0
        self._pending_since = 0.0
        self._busy: dict[str, threading.Event] = {}
        self._claims: list[BaseFileLock] = []
        self._noted = _read_notes(self.root / KIND / "hashes.json") if trust_mtime else {}
        self._new_notes = False

    @property
    def fields(self) -> dict[str, Any]:
        """What stored frames depend on besides clip and sampler."""
        return {**video_fields(self.decoder), "version": VERSION, "max_side": self.max_side}

    def cache(self, sampler: Sampler) -> Cache:
        """The cache of one sampler; its fingerprint covers rule, count, size, colour policy and decoder."""
        fields = {
            **self.fields,
            # The times that `at:` names belong to a clip, not to a rule: they are part of the entry's key.
            "sampler": "at" if sampler.times else sampler.name, "count": None if sampler.times else sampler.count,
        }  # fmt: skip
        place = _place(sampler)
        with self._lock:
            if place not in self._caches:
                self._caches[place] = Cache.open_or_create(self.root, KIND, fields)
            return self._caches[place]

    def read(self, ref: ImageRef | str | Path | bytes, sampler: Sampler | None = None) -> Frames:
        """The frames a sampler takes of a clip: stored ones, or decoded now and stored with the next shard.

        Args:
            ref: a file, or the bytes of one.
            sampler: by default 8 frames by ``midpoint``.

        Raises:
            MediaError: as ``decode_video``; what cannot be decoded is not stored.
        """
        sampler = sampler or Sampler()
        cache, place = self.cache(sampler), _place(sampler)
        key = f"{self.digest(ref)}\n{sampler.name if sampler.times else ''}"
        name = hashlib.sha256(f"{cache.folder.name}\n{key}".encode()).hexdigest()[:32]
        while True:
            with self._lock:
                found = self._held(place, cache, key)
                if found is not None:
                    return found
                busy = self._busy.get(name)
                if busy is None:
                    self._busy[name] = threading.Event()
                    break
            busy.wait()
        try:
            return self._decoded(ref, sampler, cache, key, name)
        finally:
            with self._lock:
                self._busy.pop(name).set()

    def _held(self, place: tuple[str, int], cache: Cache, key: str) -> Frames | None:
        waiting = self._pending.get(place, {}).get(key)
        if waiting is not None:
            return waiting
        stored = cache.entry(key)
        return None if stored is None else _frames(stored)

    def _decoded(
        self, ref: ImageRef | str | Path | bytes, sampler: Sampler, cache: Cache, key: str, name: str
    ) -> Frames:  # fmt: skip
        """Decode a clip that nobody in this process has, unless another process stores it in the meantime."""
        place = _place(sampler)
        claim = self._claim(cache.folder / "locks", name)
        try:
            with self._lock:
                cache.refresh(changed=True)
                found = self._held(place, cache, key)
                if found is not None:
                    return found
            found = decode_video(ref, sampler, max_side=self.max_side, limits=self.limits, decoder=self.decoder)
            with self._lock:
                self.decoded += 1
                self._pending.setdefault(place, {})[key] = found
                self._pending_bytes += found.frames.nbytes
                self._pending_since = self._pending_since or time.monotonic()
                if claim is not None:
                    self._claims.append(claim)
                    claim = None
                full = (
                    self._pending_bytes >= self._flush_bytes
                    or sum(map(len, self._pending.values())) >= FLUSH_CLIPS
                    or time.monotonic() - self._pending_since >= FLUSH_SECONDS
                )
        finally:
            if claim is not None:
                _release(claim)
        if full:
            self.flush()
        return found

    def _claim(self, folder: Path, name: str) -> BaseFileLock | None:
        """The right to decode one entry; None where it cannot be had."""
        from filelock import FileLock, Timeout

        until = time.monotonic() + WAIT_SECONDS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Not bound to the thread: whichever thread writes the shard lets it go.
            lock = FileLock(folder / f"{name}.lock", thread_local=False)
            while time.monotonic() < until:
                try:
                    lock.acquire(timeout=0.05)
                    return lock
                except Timeout:
                    self.flush()  # whoever holds it may be waiting for one of ours
        except (OSError, NotImplementedError):
            pass  # a file system without locks
        return None

    def fill(
        self, refs: Iterable[ImageRef | str | Path | bytes], sampler: Sampler | None = None, *, workers: int = 2,
        progress: bool = False,
    ) -> list[MediaError]:  # fmt: skip
        """Decode and store every clip that is not stored yet; a fill that was killed goes on where it was.

        Returns:
            what could not be decoded, an error each.
        """
        given = list(refs)
        failed: list[MediaError] = []

        def one(ref: ImageRef | str | Path | bytes) -> MediaError | None:
            try:
                self.read(ref, sampler)
            except MediaError as error:
                return error
            return None

        with (
            progress_bar("Decoding clips", len(given), enabled=progress) as advance,
            ThreadPoolExecutor(max(1, workers), thread_name_prefix="mmalign-frames") as pool,
        ):
            for error in pool.map(one, given):
                if error is not None:
                    failed.append(error)
                advance(1)
        self.flush()
        return failed

    def flush(self) -> None:
        """Write what was decoded and is not stored yet.

        Raises:
            DataError: the disk is full.
        """
        with self._lock:
            claims, self._claims = self._claims, []
            try:
                for place, entries in self._pending.items():
                    self._caches[place].store(list(entries), _tensors(list(entries.values())))
                self._pending, self._pending_bytes, self._pending_since = {}, 0, 0.0
            finally:
                for claim in claims:
                    _release(claim)
            if self._new_notes:
                write_json(self.root / KIND / "hashes.json", self._noted)
                self._new_notes = False

    def digest(self, ref: ImageRef | str | Path | bytes) -> str:
        """SHA-256 of a clip's bytes, in hexadecimal.

        Raises:
            MediaError: unreadable_video, where the file cannot be read.
        """
        data = ref if isinstance(ref, bytes) else ref.data if isinstance(ref, ImageRef) else None
        if data is not None:
            return hashlib.sha256(data).hexdigest()
        path = ref.path if isinstance(ref, ImageRef) else ref
        label = ref.label if isinstance(ref, ImageRef) else str(ref)
        if path is None or isinstance(path, bytes):
            raise MediaError(reason="unreadable_video", detail="neither a path nor bytes", source=label)
        try:
            return self._file_digest(Path(path).resolve())
        except OSError as error:
            raise MediaError(reason="unreadable_video", detail=str(error), source=label or str(path)) from error

    def _file_digest(self, path: Path) -> str:
        if not self.trust_mtime:
            return file_hash(path)
        status = path.stat()
        mark = [status.st_size, status.st_mtime_ns]
        noted = self._noted.get(str(path))
        if noted is None or noted[:2] != mark:
            noted = [*mark, file_hash(path)]
            with self._lock:
                self._noted[str(path)] = noted
                self._new_notes = True
        return str(noted[2])


def _place(sampler: Sampler) -> tuple[str, int]:
    return ("at", 0) if sampler.times else (sampler.name, sampler.count)


def _release(claim: BaseFileLock) -> None:
    """Give a lock back. Its file can go first: whoever gets hold of it still looks at what is stored before decoding."""
    with suppress(OSError):
        Path(claim.lock_file).unlink(missing_ok=True)
    claim.release()


def _tensors(entries: list[Frames]) -> dict[str, list[Tensor]]:
    facts = [json.dumps({"total": f.total, "duration": f.duration, "flags": list(f.flags)}).encode() for f in entries]
    return {
        "frames": [torch.from_numpy(np.ascontiguousarray(found.frames)) for found in entries],
        "timestamps": [torch.from_numpy(found.timestamps) for found in entries],
        "indices": [torch.from_numpy(found.indices) for found in entries],
        "facts": [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in facts],
    }


def _frames(stored: dict[str, Tensor]) -> Frames:
    facts: dict[str, Any] = json.loads(stored["facts"].numpy().tobytes())
    return Frames(
        frames=stored["frames"].numpy(), timestamps=stored["timestamps"].numpy(), indices=stored["indices"].numpy(),
        total=facts["total"], duration=facts["duration"], flags=tuple(facts["flags"]),
    )  # fmt: skip


def _read_notes(path: Path) -> dict[str, list[Any]]:
    """Size, time and hash of files seen before; a lost list only means hashing again."""
    try:
        noted = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


__all__ = ["KIND", "FrameCache"]
