"""Frames of clips: decoded once, read back bit for bit, found by content, sampler and size alone."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.data import Cache, CacheWarning, FrameCache
from mmalign.data import frames as frames_module
from mmalign.errors import DataError
from mmalign.media import Frames, MediaError, Sampler, decode_video, perturbed
from mmalign.types import ImageRef
from tests.data.clips import clip, grey


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three clips of different sizes and lengths, and one that is cut short."""
    folder = tmp_path_factory.mktemp("clips")
    made = {"a": clip(12), "b": clip(7, size=(48, 32)), "c": clip(3, size=(64, 64)), "cut": clip(12)[:-900]}
    for name, data in made.items():
        (folder / f"{name}.mp4").write_bytes(data)
    return {name: folder / f"{name}.mp4" for name in made}


def same(left: Frames, right: Frames) -> bool:
    return all(np.array_equal(getattr(left, item.name), getattr(right, item.name)) for item in fields(Frames))


def test_clips_of_all_sizes_come_back_as_they_were_decoded(clips: dict[str, Path], tmp_path: Path) -> None:
    sampler = Sampler(name="interior", count=5)
    store = FrameCache(tmp_path)
    assert store.fill([clips["a"], clips["b"], clips["c"], clips["a"]], sampler) == []
    assert store.decoded == 3
    again = FrameCache(tmp_path)
    for name in ("c", "a", "b"):
        assert same(again.read(clips[name], sampler), decode_video(clips[name], sampler))
    assert again.decoded == 0
    assert again.read(clips["c"], sampler).flags == ("short_video",)
    assert [int(frame[-1, -1, 0]) for frame in again.read(clips["a"], sampler).frames] == pytest.approx(
        [grey(number) for number in (2, 4, 6, 8, 10)], abs=3
    )


def test_content_counts_and_not_the_name(clips: dict[str, Path], tmp_path: Path) -> None:
    store = FrameCache(tmp_path / "cache")
    data = clips["a"].read_bytes()
    first = store.read(clips["a"])
    moved = tmp_path / "moved.mp4"
    moved.write_bytes(data)
    for ref in (moved, data, ImageRef(data=data), ImageRef(path=str(moved))):
        assert same(store.read(ref), first)
    assert store.decoded == 1
    moved.write_bytes(clips["b"].read_bytes())
    assert store.read(moved).frames.shape[1:3] == (48, 32)
    assert store.decoded == 2


def test_sampler_and_size_are_told_apart(clips: dict[str, Path], tmp_path: Path) -> None:
    samplers = [
        Sampler(), Sampler(count=4), Sampler(name="linspace"), Sampler(name="fps:2"), Sampler(name="fps:4"),
        Sampler(name="at:0.1,0.5"), Sampler(name="at:0.1,0.6"),
    ]  # fmt: skip
    store = FrameCache(tmp_path)
    for sampler in samplers:
        store.read(clips["a"], sampler)
    assert store.decoded == len(samplers)
    store.flush()
    # What `at:` names is part of the entry, so its clips share one folder.
    assert len(list((tmp_path / "frames").iterdir())) == len(samplers) - 1
    small = FrameCache(tmp_path, max_side=24)
    assert small.read(clips["a"]).frames.shape == (8, 16, 24, 3)
    assert small.decoded == 1
    again = FrameCache(tmp_path)
    for sampler in samplers:
        assert same(again.read(clips["a"], sampler), decode_video(clips["a"], sampler))
    assert again.decoded == 0


def test_a_bad_clip_is_refused_every_time_and_never_stored(clips: dict[str, Path], tmp_path: Path) -> None:
    store = FrameCache(tmp_path)
    failed = store.fill([clips["a"], clips["cut"], tmp_path / "none.mp4", clips["b"]])
    assert [error.reason for error in failed] == ["unreadable_video", "unreadable_video"]
    assert store.decoded == 2
    with pytest.raises(MediaError, match="cut short"):
        FrameCache(tmp_path).read(clips["cut"])


def test_a_changed_byte_is_noticed_and_the_clip_decoded_again(clips: dict[str, Path], tmp_path: Path) -> None:
    store = FrameCache(tmp_path)
    first = store.read(clips["a"])
    store.flush()
    (shard,) = (tmp_path / "frames").glob("*/shard-*")
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(bytes(data))
    again = FrameCache(tmp_path)
    with pytest.warns(CacheWarning, match="does not match its checksum"):
        found = again.read(clips["a"])
    assert same(found, first)
    assert again.decoded == 1


def test_a_perturbed_clip_is_taken_from_the_stored_one(clips: dict[str, Path], tmp_path: Path) -> None:
    store = FrameCache(tmp_path)
    store.fill([clips["a"]])
    whole = store.read(clips["a"])
    for kind in ("reverse", "shuffle", "drop"):
        numbers = perturbed(len(whole.frames), kind, seed=3, key="a")
        part = store.read(clips["a"]).take(numbers)
        assert np.array_equal(part.frames, whole.frames[numbers])
        assert part.timestamps.tolist() == whole.timestamps[numbers].tolist()
    assert store.decoded == 1


def test_times_of_files_are_trusted_only_when_told(clips: dict[str, Path], tmp_path: Path) -> None:
    import os

    file = tmp_path / "clip.mp4"
    file.write_bytes(clips["a"].read_bytes())
    store = FrameCache(tmp_path / "cache", trust_mtime=True)
    store.fill([file])
    before = file.stat()
    other = bytearray(file.read_bytes())
    other[len(other) // 2] ^= 1
    file.write_bytes(bytes(other))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    trusting, careful = FrameCache(tmp_path / "cache", trust_mtime=True), FrameCache(tmp_path / "cache")
    assert trusting.digest(file) != careful.digest(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert trusting.digest(file) == careful.digest(file)


def test_entries_that_differ_in_size(tmp_path: Path) -> None:
    """Shapes, empty entries and types survive; a cache of such entries takes no others, and refuses to be stacked."""
    cache = Cache.open_or_create(tmp_path, "any", {"a": 1})
    ragged = [torch.arange(6).reshape(2, 3), torch.zeros(0, 3, dtype=torch.int64), torch.arange(3).reshape(1, 3)]
    cache.store(["x", "y", "z"], {"ragged": ragged, "plain": torch.tensor([[1.5], [2.5], [3.5]])})
    cache.store(["w"], {"ragged": [torch.ones(4, 1, dtype=torch.int64)], "plain": torch.tensor([[4.5]])})
    found = Cache.open_or_create(tmp_path, "any", {"a": 1})
    for key, value, plain in zip("xyz", ragged, (1.5, 2.5, 3.5), strict=True):
        entry = found.entry(key)
        assert entry is not None and torch.equal(entry["ragged"], value) and entry["plain"].tolist() == [plain]
    assert found.entry("w") is not None and found.entry("v") is None
    with pytest.raises(DataError, match="differ in size"):
        found.gather(["x"])
    with pytest.raises(DataError, match="entries of a cache must be alike"):
        cache.store(["q"], {"ragged": [torch.zeros(3)], "plain": torch.zeros(1, 1)})
    with pytest.raises(DataError, match="one type and number of axes"):
        cache.store(["q"], {"ragged": [torch.zeros(3), torch.zeros(1, 1)], "plain": torch.zeros(2, 1)})
    assert len(Cache.open_or_create(tmp_path, "any", {"a": 1})) == 4


def test_threads_that_ask_for_one_clip_decode_it_once(clips: dict[str, Path], tmp_path: Path) -> None:
    store = FrameCache(tmp_path)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: store.read(clips[name]), ["a", "b", "c", "a", "b", "c"] * 4))
    assert store.decoded == 3
    assert all(same(left, right) for left, right in zip(found[:3], found[-3:], strict=True))


def decode_all(root: str, files: list[str], out: str) -> None:
    store = FrameCache(root)
    Path(out).touch()
    store.fill(files, workers=2)
    Path(out).write_text(str(store.decoded))


def test_processes_that_fill_one_folder_decode_every_clip_once(tmp_path: Path) -> None:
    """Another process and two stores in this one; each has the films in another order, so each holds what others want."""
    files = [str(tmp_path / f"{number}.mp4") for number in range(6)]
    for number, file in enumerate(files):
        Path(file).write_bytes(clip(20 + number, size=(128, 128)))
    root, out = tmp_path / "cache", tmp_path / "decoded"
    other = multiprocessing.get_context("spawn").Process(target=decode_all, args=(str(root), files, str(out)))
    other.start()
    while not out.exists():
        assert other.is_alive() or other.exitcode == 0
        time.sleep(0.005)
    stores = [FrameCache(root), FrameCache(root)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda store, order: store.fill(order), stores, (files[::-1], files[::2] + files[1::2])))
    other.join(120)
    assert other.exitcode == 0
    assert sum(store.decoded for store in stores) + int(out.read_text()) == len(files)
    assert not any((tmp_path / "cache" / "frames").glob("*/locks/*"))
    again = FrameCache(root)
    assert again.fill(files) == [] and again.decoded == 0


def test_a_clip_that_another_holds_too_long_is_decoded_here(
    clips: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames_module, "WAIT_SECONDS", 0.1)
    idle, store = FrameCache(tmp_path), FrameCache(tmp_path)
    first = idle.read(clips["a"])  # decoded, and held until it is stored
    assert same(store.read(clips["a"]), first)
    assert (idle.decoded, store.decoded) == (1, 1)
    idle.flush()
    store.flush()
    again = FrameCache(tmp_path)
    assert same(again.read(clips["a"]), first) and again.decoded == 0


def test_a_bad_clip_keeps_nobody_waiting(clips: dict[str, Path], tmp_path: Path) -> None:
    stores = [FrameCache(tmp_path), FrameCache(tmp_path)]
    for store in stores:
        with pytest.raises(MediaError, match="cut short"):
            store.read(clips["cut"])
