"""Caches: each entry computed once, found exactly, never half-written, never trusted when damaged."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.data import (
    Cache,
    CacheWarning,
    PairLoader,
    fill,
    fill_latents,
    fill_text,
    geometry_fields,
    index_media,
    open_table,
)
from mmalign.data.check import usable_rows
from mmalign.data.files import canonical_hash
from mmalign.data.sources import latent_key, text_key
from mmalign.errors import DataError
from tests.data.making import make_jsonl, make_pairs, number_of, picture
from tests.forks import kill_when, run_code, start

FIELDS = {"model": "abc", "dtype": "float32"}


class Encoder:
    """Doubles numbers, and counts what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, inputs: list[int]) -> dict[str, Tensor]:
        self.batches.append(list(inputs))
        values = torch.tensor(inputs, dtype=torch.float32)
        return {"double": 2 * values[:, None, None].expand(-1, 2, 3).clone(), "half": (values / 2).to(torch.bfloat16)}


def items(count: int, start: int = 0) -> list[tuple[str, int]]:
    return [(f"key-{number}", number) for number in range(start, start + count)]


def test_fill_gather_and_second_pass(tmp_path: Path) -> None:
    encoder = Encoder()
    cache = Cache.open_or_create(tmp_path, "vae", FIELDS)
    assert cache.missing(["key-1", "key-0", "key-1"]) == ["key-1", "key-0"]
    report = cache.fill(items(10) + items(10), encoder, batch_size=4)
    assert (report.stored, report.refused, len(cache)) == (10, (), 10)
    # Always full batches: the last one repeats its last input.
    assert encoder.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    found = cache.gather(["key-7", "key-0", "key-7"])
    assert found["double"].shape == (3, 2, 3) and found["double"].dtype == torch.float32
    assert found["double"][:, 1, 2].tolist() == [14.0, 0.0, 14.0]
    assert found["half"].dtype == torch.bfloat16 and found["half"].tolist() == [3.5, 0.0, 3.5]
    again = Cache.open_or_create(tmp_path, "vae", dict(reversed(FIELDS.items())))
    assert again.fill(items(12), encoder, batch_size=4).stored == 2
    assert encoder.batches[3:] == [[10, 11, 11, 11]]
    assert again.gather(["key-11", "key-3"])["double"][:, 0, 0].tolist() == [22.0, 6.0]
    with pytest.raises(DataError, match=r"1 of 2 entries are not in the cache, first 'key-99'"):
        again.gather(["key-1", "key-99"])


def test_any_difference_is_another_cache(tmp_path: Path) -> None:
    base = Cache.open_or_create(tmp_path, "vae", FIELDS).folder
    others = [
        Cache.open_or_create(tmp_path, "text", FIELDS),
        Cache.open_or_create(tmp_path, "vae", {**FIELDS, "dtype": "bfloat16"}),
        Cache.open_or_create(tmp_path, "vae", {**FIELDS, "extra": None}),
    ]
    assert len({base, *(cache.folder for cache in others)}) == 4
    assert Cache.open_or_create(tmp_path, "vae", FIELDS).folder == base
    one, other = (geometry_fields(resolution=(side, 16)) for side in (16, 32))
    assert one != other
    assert geometry_fields(resolution=(16, 16), crop="random", crop_variants=2) != one
    with pytest.raises(DataError, match="not plain JSON"):
        Cache.open_or_create(tmp_path, "vae", {"path": tmp_path})


def test_the_place_of_the_root_does_not_matter(tmp_path: Path) -> None:
    one = Cache.open_or_create(tmp_path / "a", "vae", FIELDS)
    other = Cache.open_or_create(tmp_path / "b" / "c", "vae", FIELDS)
    assert one.folder.name == other.folder.name
    one.fill(items(3), Encoder(), batch_size=2)
    other.fill(reversed(items(3)), Encoder(), batch_size=3)
    for name, value in one.gather(["key-2", "key-0"]).items():
        assert torch.equal(value, other.gather(["key-2", "key-0"])[name])


def test_a_flipped_byte_is_found_and_computed_again(tmp_path: Path) -> None:
    cache = Cache.open_or_create(tmp_path, "vae", FIELDS)
    cache.fill(items(4), Encoder(), batch_size=4)
    cache.fill(items(4, start=4), Encoder(), batch_size=4)
    shard = sorted(cache.folder.glob("shard-*"))[0]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.warns(CacheWarning, match=shard.name):
        again = Cache.open_or_create(tmp_path, "vae", FIELDS)
    assert len(again) == 4
    encoder = Encoder()
    with pytest.warns(CacheWarning, match="checksum"):
        again.fill(items(8), encoder, batch_size=4)
    assert len(again) == 8 and len(encoder.batches) == 1
    assert again.gather([f"key-{n}" for n in range(8)])["double"][:, 0, 0].tolist() == [2.0 * n for n in range(8)]


def test_checksums_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache.open_or_create(tmp_path, "vae", FIELDS).fill(items(4), Encoder(), batch_size=4)
    Cache.open_or_create(tmp_path, "vae", FIELDS)

    def unwanted(path: Path) -> str:
        raise AssertionError(f"hashed {path} again")

    monkeypatch.setattr("mmalign.data.cache.file_hash", unwanted)
    assert len(Cache.open_or_create(tmp_path, "vae", FIELDS)) == 4


@pytest.mark.parametrize("content", [b"", b"\x01\x00\x00\x00\x00\x00\x00\x00", b"\xff" * 64, b"{}"])
def test_a_file_that_is_no_shard_is_left_out(tmp_path: Path, content: bytes) -> None:
    import hashlib

    cache = Cache.open_or_create(tmp_path, "vae", FIELDS)
    cache.fill(items(2), Encoder(), batch_size=2)
    (cache.folder / f"shard-{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)
    with pytest.warns(CacheWarning, match="not a readable cache shard"):
        assert len(Cache.open_or_create(tmp_path, "vae", FIELDS)) == 2


@pytest.mark.parametrize("content", ["{", '{"version": 0}'])
def test_an_unusable_manifest_is_set_aside(tmp_path: Path, content: str) -> None:
    cache = Cache.open_or_create(tmp_path, "vae", FIELDS)
    cache.fill(items(2), Encoder(), batch_size=2)
    (cache.folder / "manifest.json").write_text(content)
    with pytest.warns(CacheWarning, match="manifest.json"):
        fresh = Cache.open_or_create(tmp_path, "vae", FIELDS)
    assert len(fresh) == 0
    assert len(list(fresh.folder.parent.glob("*.unusable-*/shard-*"))) == 1  # nothing was deleted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Cache.open_or_create(tmp_path, "vae", FIELDS)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def encode(inputs: list[int]) -> dict[str, Tensor]:
        values = torch.tensor(inputs, dtype=torch.float32)
        values[values == 1] = float("nan")
        values[values == 2] = float("inf")
        return {"value": values}

    cache = Cache.open_or_create(tmp_path, "vae", FIELDS)
    report = cache.fill(items(5), encode, batch_size=2)
    assert (report.stored, report.refused) == (3, ("key-1", "key-2"))
    assert cache.missing(key for key, _ in items(5)) == ["key-1", "key-2"]


def test_entries_must_be_alike(tmp_path: Path) -> None:
    cache = Cache.open_or_create(tmp_path, "vae", FIELDS)
    cache.fill(items(2), Encoder(), batch_size=2)
    with pytest.raises(DataError, match="must be alike"):
        cache.fill(items(2, start=2), lambda inputs: {"double": torch.zeros(len(inputs), 5)}, batch_size=2)
    with pytest.raises(DataError, match="one row for each"):
        cache.fill(items(2, start=2), lambda inputs: {"double": torch.zeros(1, 5)}, batch_size=2)


CHILD = """
import sys, time
from pathlib import Path
import torch
from mmalign.data import Cache
root, pause, log = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
def encode(inputs):
    with log.open("a") as handle:
        handle.write("".join(f"{i}\\n" for i in inputs))
    time.sleep(pause)
    return {"value": torch.tensor(inputs, dtype=torch.float32)[:, None]}
cache = Cache.open_or_create(root, "vae", {"a": 1})
cache.fill(((f"key-{n}", n) for n in range(40)), encode, batch_size=4, shard_seconds=0.0)
sys.exit(len(cache) != 40)
"""


def test_a_killed_fill_is_continued_and_two_fills_share_the_work(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    killed = start(run_code, CHILD, str(root), "0.3", str(log))
    assert kill_when(killed, lambda: len(list(root.glob("vae/*/shard-*"))) >= 2)
    cache = Cache.open_or_create(root, "vae", {"a": 1})
    kept = len(cache)
    assert 8 <= kept < 40
    log.unlink()
    both = [start(run_code, CHILD, str(root), "0.01", str(log)) for _ in range(2)]
    for process in both:
        process.join(timeout=90)
    assert [process.exitcode for process in both] == [0, 0], "each found all forty at its end"
    encoded = [int(line) for line in log.read_text().split()]
    assert sorted(encoded) == list(range(kept, 40))  # nothing twice, nothing that was kept
    cache.refresh()
    assert cache.gather([f"key-{n}" for n in range(40)])["value"][:, 0].tolist() == list(range(40))
    assert not [path for path in cache.folder.iterdir() if path.name.endswith(".tmp") and path.stat().st_size == 0]


# --- caches of a table ------------------------------------------------------------------------------------------------


class Vae:
    """'Latents' that are the pixels themselves, so that a batch from the cache can be compared with one without."""

    def __init__(self) -> None:
        self.calls = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        self.shapes.add(tuple(pixels.shape))
        return {"mean": pixels.clone(), "std": pixels.abs()}


def encode_text(prompts: list[str]) -> dict[str, Tensor]:
    return {"tokens": torch.tensor([[len(p), sum(p.encode())] for p in prompts], dtype=torch.float32)}


def encode_badly(prompts: list[str]) -> dict[str, Tensor]:
    return {"tokens": torch.tensor([float("nan") if prompt == "prompt 3" else 0.0 for prompt in prompts])}


def batches(loader: PairLoader, count: int) -> list[Any]:
    iterator: Iterator[Any] = loader.micro_batches()
    return [batch for _, _, batch in itertools.islice(iterator, count)]


@pytest.mark.parametrize(("crop", "variants", "flip"), [("center", 0, False), ("center", 0, True), ("random", 3, True)])
def test_cached_batches_equal_uncached_ones(tmp_path: Path, crop: str, variants: int, flip: bool) -> None:
    table = open_table(make_pairs(tmp_path / "table", 7, size=(20, 28)))
    checked = usable_rows(table, check="online", progress=False)
    assert checked.media is not None
    settings: dict[str, Any] = {"resolution": (8, 8), "crop": crop, "crop_variants": variants, "flip": flip}
    cache = Cache.open_or_create(tmp_path / "cache", "vae", {"fake": 1})
    text = Cache.open_or_create(tmp_path / "cache", "text", {"fake": 1})
    vae = Vae()
    filling = {**settings, "encode": vae, "batch_size": 4, "progress": False}
    outcome = fill_latents(cache, table, checked.rows, checked.media, **filling)
    assert outcome.stored == len(cache) == 14 * max(variants, 1) * (2 if flip else 1)
    assert vae.shapes == {(4, 3, 8, 8)}
    calls = vae.calls
    assert fill_latents(cache, table, checked.rows, checked.media, **filling).stored == 0
    assert vae.calls == calls
    fill_text(text, table, checked.rows, encode=encode_text, batch_size=4, drop_caption=0.4, progress=False)
    assert len(text) == 8  # seven prompts and ''
    shared: dict[str, Any] = {**settings, "batch_size": 3, "drop_caption": 0.4, "seed": 2, "media": checked.media}
    plain = batches(PairLoader(table, checked.rows, **shared), 9)
    cached = batches(PairLoader(table, checked.rows, latents=cache, text=text, **shared), 9)
    for one, other in zip(plain, cached, strict=True):
        assert one.ids == other.ids and one.prompts == other.prompts
        for side in ("chosen", "rejected"):
            left, right = getattr(one, side), getattr(other, side)
            assert right.pixels is None
            assert torch.equal(left.pixels, right.moments.mean)
            assert torch.equal(left.pixels.abs(), right.moments.std)
            for field in ("original", "crop", "target"):
                assert torch.equal(getattr(left.geometry, field), getattr(right.geometry, field))
        assert torch.equal(other.text["tokens"], encode_text(list(one.prompts))["tokens"])


def test_media_facts_without_a_check(tmp_path: Path) -> None:
    table = open_table(make_pairs(tmp_path / "table", 4, size=(6, 9)))
    checked = usable_rows(table, check="online", progress=False)
    assert checked.media is not None
    facts = index_media(table, [1, 3], 2, progress=False)
    for row in (1, 3):
        for side in (0, 1):
            assert facts.picture(row, side) == checked.media.picture(row, side)
    assert facts.picture(3, 1).size == (6, 9)


def test_a_row_with_a_bad_latent_is_left_out_whole(tmp_path: Path) -> None:
    table = open_table(make_pairs(tmp_path / "table", 5))
    checked = usable_rows(table, check="online", progress=False)
    assert checked.media is not None

    def overflow(pixels: Tensor) -> dict[str, Tensor]:
        mean = pixels.clone()
        for place, one in enumerate(pixels):
            if number_of(one) == 5:  # rejected of row 2
                mean[place, 0, 3, 3] = float("inf")
        return {"mean": mean, "std": mean}

    cache = Cache.open_or_create(tmp_path, "vae", FIELDS)
    outcome = fill_latents(cache, table, checked.rows, checked.media, resolution=(16, 16), flip=False, encode=overflow,
                           batch_size=3, progress=False)  # fmt: skip
    assert outcome.rows.tolist() == [0, 1, 3, 4]
    assert [(p.id, p.column, p.reason) for p in outcome.problems] == [("row-2", "rejected", "nonfinite_latent")]
    loader = PairLoader(table, outcome.rows, batch_size=4, resolution=(16, 16), media=checked.media, latents=cache)
    assert sorted(batches(loader, 1)[0].ids) == ["row-0", "row-1", "row-3", "row-4"]


def test_what_a_cache_cannot_serve_is_refused_at_once(tmp_path: Path) -> None:
    table = open_table(make_pairs(tmp_path / "table", 4))
    rows = np.arange(4)
    media = index_media(table, rows, progress=False)
    cache = Cache.open_or_create(tmp_path, "vae", FIELDS)
    filling: dict[str, Any] = {"resolution": (16, 16), "encode": Vae(), "batch_size": 4, "progress": False}
    with pytest.raises(DataError, match="random crops cannot be cached"):
        fill_latents(cache, table, rows, media, flip=False, crop="random", **filling)
    fill_latents(cache, table, rows[:3], media, flip=False, **filling)
    loading: dict[str, Any] = {"batch_size": 2, "resolution": (16, 16), "latents": cache}
    with pytest.raises(DataError, match="run the check first"):
        PairLoader(table, rows, **loading)
    with pytest.raises(DataError, match=r"2 latents of this table are not in the cache; fill"):
        PairLoader(table, rows, media=media, **loading)
    with pytest.raises(DataError, match="a latent must not be mirrored"):
        PairLoader(table, rows[:3], media=media, flip=True, **loading)
    with pytest.raises(DataError, match="random crops cannot be cached"):
        PairLoader(table, rows[:3], media=media, crop="random", **loading)
    text = Cache.open_or_create(tmp_path, "text", FIELDS)
    fill_text(text, table, rows, encode=encode_text, batch_size=2, progress=False)
    with pytest.raises(DataError, match="1 prompts are not in the cache, first ''"):
        PairLoader(table, rows, batch_size=2, resolution=(16, 16), text=text, drop_caption=0.1)
    with pytest.raises(DataError, match=r"not finite for 1 prompts, first 'prompt 3'"):
        bad = Cache.open_or_create(tmp_path, "text", {"other": 1})
        fill_text(bad, table, rows, batch_size=4, progress=False, encode=encode_badly)


def test_a_picture_that_changed_since_the_check_is_not_cached(tmp_path: Path) -> None:
    table = open_table(make_jsonl(tmp_path, 2))
    media = index_media(table, [0, 1], progress=False)
    (tmp_path / "images" / "3.png").write_bytes(picture(99))
    cache = Cache.open_or_create(tmp_path / "cache", "vae", FIELDS)
    with pytest.raises(DataError, match=r"pairs.jsonl line 2 column 'rejected'.*is not the file that was checked"):
        fill_latents(cache, table, [0, 1], media, resolution=(16, 16), flip=False, encode=Vae(), batch_size=4,
                     progress=False)  # fmt: skip


def test_keys_are_stable() -> None:
    # They are in caches on people's disks.
    # The hash's first half; its last four bytes hold, little endian, 2 (variant + 1) + flip on top: 2 * 3 + 1 = 7.
    assert latent_key("ab" * 32, variant=-1, flip=False) == "#" + "ab" * 16
    assert latent_key("00" * 32, variant=2, flip=True) == "#" + "00" * 12 + "07000000"
    assert text_key("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_manifest_says_what_it_is(tmp_path: Path) -> None:
    cache = Cache.open_or_create(tmp_path, "vae", FIELDS)
    assert json.loads((cache.folder / "manifest.json").read_text())["fields"] == FIELDS


def test_the_fingerprint_follows_everything_a_picture_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"resolution": (32, 32)}
    found = [canonical_hash(fill.geometry_fields(**given))]
    for change in ({"resolution": (32, 40)}, {"crop": "random"}, {"crop_variants": 2}):
        found.append(canonical_hash(fill.geometry_fields(**{**given, **change})))
    for name in ("RESIZE_RULE", "COLOUR_POLICY"):
        with monkeypatch.context() as other:
            other.setattr(fill, name, "another")
            found.append(canonical_hash(fill.geometry_fields(**given)))
    with monkeypatch.context() as other:
        other.setattr(fill.PIL, "__version__", "1.0")  # whose kernel it is
        found.append(canonical_hash(fill.geometry_fields(**given)))
    assert len(set(found)) == len(found) and found[0] == canonical_hash(fill.geometry_fields(**given))
