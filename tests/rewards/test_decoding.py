"""Other ways to the same pixels (processes), and cheaper ways to other pixels, which are named as such."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmalign import rewards
from mmalign.cli.application import app
from mmalign.cli.pictures import decoding_processes
from mmalign.errors import RewardError
from mmalign.media import PLAIN, Colours, MediaError, decode_image
from mmalign.rewards import decoding
from mmalign.rewards.decoders import CHUNK, ProcessDecoders, suitable_processes
from mmalign.rewards.decoding import Room, Wanted, load_picture
from mmalign.rewards.errors import InputError
from mmalign.rewards.inputs import read_picture
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.reading import Reader
from mmalign.rewards.staging import DeviceResize
from mmalign.types import ImageRef
from tests.rewards.test_odd_inputs import encoded, odd_pictures

RULES = {rule.key: rule for rule in (
    Preprocess("clip_hf", 48), Preprocess("clip_tv", 32), Preprocess("blip_224", 32), Preprocess("hps_letterbox", 32),
    Preprocess("clip_tv", 32, draft=True), Preprocess("hps_letterbox", 32, draft=True), Preprocess("clip_hf", 48, fast=True),
)}  # fmt: skip


@pytest.fixture(scope="module")
def decoders() -> Iterator[ProcessDecoders]:
    made = ProcessDecoders(2)
    yield made
    made.close()


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(width: int, height: int, **options: object) -> bytes:
    return encoded(smooth(width, height), "JPEG", quality=92, **options)


def odd_files() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    good = jpeg(300, 200)
    cmyk = encoded(smooth(260, 200).convert("CMYK"), "JPEG")
    return [*(data for data, _ in odd_pictures()), good, jpeg(300, 200, exif=exif), jpeg(64, 64), cmyk, good[:4000], b"<html>",
            jpeg(900, 30)]  # fmt: skip


def test_processes_make_what_threads_make(decoders: ProcessDecoders, tmp_path: Path) -> None:
    """Pixels, names of pixels, flags and reasons, for every rule and every kind of file."""
    wanted = Wanted(rules=RULES, colours=Colours(alpha="black"))
    files = odd_files()
    for row, data in enumerate(files):
        (tmp_path / f"{row}.png").write_bytes(data)
    paths: list[Path | ImageRef] = [tmp_path / f"{row}.png" for row in range(len(files))]
    paths += [tmp_path / "nowhere.png", ImageRef(path=str(tmp_path / "nowhere.png"), label="table row 7")]
    given = [decoders.load(part, wanted) for part in ([read_picture(data) for data in files], paths)]
    assert len(given[1]) == len(files) + 2
    failed = 0
    for items in given:
        for row, one in enumerate(items):
            assert one is not None
            digest, there = one
            if row >= len(files):
                assert digest == b"" and there.reason == "missing_image"
                assert (there.message or "").startswith("table row 7" if row > len(files) else str(paths[row]))
                continue
            picture = read_picture(paths[row] if items is given[1] else files[row])
            here = load_picture(picture, wanted)
            assert digest == picture.digest and here.pixel_digests == there.pixel_digests
            assert (here.flags, here.reason, here.message) == (there.flags, there.reason, there.message)
            failed += here.reason is not None
            assert set(here.pixels) == set(there.pixels) == (set(RULES) if here.reason is None else set())
            assert all(torch.equal(here.pixels[key], there.pixels[key]) for key in here.pixels)
    assert failed == 4


def test_pictures_come_back_whole_for_a_device_that_resizes(decoders: ProcessDecoders) -> None:
    """Sizes that were met often enough arrive undivided, and give the same pixels; others are resized over there."""
    stage = DeviceResize(torch.device("cpu"))
    rules = {rule.key: rule for rule in (Preprocess("clip_hf", 48), Preprocess("hps_letterbox", 32))}
    reader = Reader(rules, keep_image=False, limits=Wanted(rules={}).limits, stage=stage, decoders=decoders)
    plain = Reader(rules, keep_image=False, limits=reader.wanted.limits)
    files = [encoded(smooth(160, 120, seed)) for seed in range(2 * CHUNK + 6)] + [encoded(smooth(50, 70))]
    with ThreadPoolExecutor(1) as pool:  # one chunk after the other, so that it is known which is the first to come whole
        found, expected = reader.read(files, 0, pool), plain.read(files, 0, pool)
    assert stage.ready(rules) == ((160, 120),)
    whole = dict.fromkeys(rules, 0)
    for digest in expected.digests:
        one, other = found.pictures[digest], expected.pictures[digest]
        for key in rules:
            assert torch.equal(one.pixels[key], other.pixels[key])
            whole[key] += one.pixel_digests[key] != other.pixel_digests[key]  # named after the file, not after their pixels
    # The last are read first: three and the odd one, four, and then the size is known. Letterboxes are always made there.
    assert whole == {"clip_hf:48": 2 * CHUNK + 6 - 7, "hps_letterbox:32": 2 * CHUNK + 6 + 1}


def test_a_file_in_many_rows_is_read_once_and_rows_speak_for_themselves(
    decoders: ProcessDecoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad, copy = tmp_path / "good.jpg", tmp_path / "none.jpg", tmp_path / "copy.jpg"
    for file in (good, copy):
        file.write_bytes(jpeg(60, 50))
    rows = [ImageRef(path=str(path), label=f"row {number}") for number, path in enumerate([good, bad, good, bad, copy, good])]
    asked: list[int] = []
    load = decoders.load

    def counted(items: Sequence[Any], *rest: Any) -> Any:
        asked.append(len(items))
        return load(items, *rest)

    monkeypatch.setattr(decoders, "load", counted)
    rules = {"clip_tv:32": Preprocess("clip_tv", 32)}
    reader = Reader(rules, keep_image=False, limits=Wanted(rules={}).limits, decoders=decoders)
    with ThreadPoolExecutor(2) as pool:
        found = reader.read(rows, 40, pool)
    assert asked == [3] and found.decoded == 1  # three files; two of them are one picture
    assert len({found.digests[row] for row in (0, 2, 4, 5)}) == 1
    assert [(found.pictures[found.digests[row]].message or "")[:5] for row in (1, 3)] == ["row 1", "row 3"]


def test_scores_with_decoding_processes_are_the_same(clip_folder: Path, decoders: ProcessDecoders) -> None:
    files = [jpeg(120 + row, 100) for row in range(9)] * 2
    plain = rewards.load(["clipscore", "hpsv2.1"], dict.fromkeys(["clipscore", "hpsv2.1"], clip_folder), dtype="fp32")
    other = rewards.ScorerSet(plain.backends)
    other.engine.reader.decoders = decoders
    one, two = plain.score(files, "a red circle", batch_size=4), other.score(files, "a red circle", batch_size=4)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert other.engine.counters.decoded == plain.engine.counters.decoded
    assert torch.equal(other["clipscore"].score(files, "a red circle", batch_size=4), one["clipscore"])
    with pytest.raises(rewards.ScoringError, match="row 1: truncated_image"):
        other.score([files[0], files[1][:900]], "a red circle")
    with pytest.raises(InputError, match="decode_workers"):
        rewards.load("tiny-clip", decode_workers=-1)


def test_a_draft_is_pillows_and_never_too_small() -> None:
    rule, data = Preprocess("clip_tv", 32, draft=True), jpeg(600, 300)
    by_hand = Image.open(io.BytesIO(data))
    by_hand.draft("RGB", (128, 64))  # a quarter: 150 x 75
    assert by_hand.size == (150, 75)
    found = rule.from_image(decode_image(data, draft=rule.least).image)
    assert torch.equal(found, Preprocess("clip_tv", 32).from_image(by_hand.convert("RGB")))
    for size in ((600, 300), (300, 600), (1000, 65), (64, 64), (63, 200)):
        short, letterbox = rule, Preprocess("hps_letterbox", 32, draft=True)
        for kind, side in ((short, min), (letterbox, max)):
            got = decode_image(jpeg(*size), draft=kind.least).image.size
            assert side(got) >= min(64, side(size)), (size, kind.id, got)
    png = encoded(smooth(600, 300))
    assert decode_image(png, draft=rule.least).image.size == (600, 300)


def test_one_rules_draft_does_not_depend_on_the_others() -> None:
    """A larger network beside it, or one that reads the whole picture, changes no pixel."""
    rules = [Preprocess("clip_tv", 32, draft=True), Preprocess("clip_tv", 96, draft=True), Preprocess("clip_tv", 32)]
    picture = read_picture(jpeg(800, 800))
    together = load_picture(picture, Wanted(rules={rule.key: rule for rule in rules}, keep_image=True))
    assert together.image is not None and together.image.size == (800, 800)
    for rule in rules:
        alone = load_picture(picture, Wanted(rules={rule.key: rule}))
        assert torch.equal(alone.pixels[rule.key], together.pixels[rule.key])
    small, _, full = (together.pixels[rule.key] for rule in rules)
    assert not torch.equal(small, full) and (small.float() - full.float()).abs().mean() < 3


@pytest.mark.parametrize(("height", "width"), [(142, 80), (80, 142), (67, 32), (20, 12), (32, 32), (300, 41)])
def test_the_fast_form_is_what_the_libraries_resize(height: int, width: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    image = smooth(width, height)
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    library = transforms.Compose(
        [transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True), transforms.CenterCrop(32)]
    )(planes)
    fast, slow = Preprocess("clip_tv", 32, fast=True), Preprocess("clip_tv", 32)
    assert torch.equal(fast.from_image(image), library)
    assert (fast.from_image(image).int() - slow.from_image(image).int()).abs().max() <= 2
    assert fast.key == "clip_tv_u8tv:32" and Preprocess("hps_letterbox", 32, fast=True).key == "hps_letterbox:32"


def test_options_change_the_card_the_record_and_nothing_they_should_not(clip_folder: Path) -> None:
    plain = rewards.load("clipscore", clip_folder)
    cheap = rewards.load("clipscore", clip_folder, decode="draft2x", fast_preprocess=True)
    assert plain.card.preprocess == "clip_hf:32" and plain.backend.record()["preprocess"] == "clip_hf:32"
    assert cheap.card.preprocess == cheap.backend.record()["preprocess"] == "clip_hf_u8tv+draft2x:32"
    files = [jpeg(400, 320)]
    one, two = (scorer.score(files, "a", details=True).embeddings for scorer in (plain, cheap))
    assert one is not None and two is not None and not torch.equal(one, two)
    with pytest.raises(RewardError, match=r"full, draft2x; got 'half'"):
        rewards.load("tiny-clip", decode="half")


def test_floats_outside_the_unit_range_are_errors_unless_clipped() -> None:
    values = np.linspace(0, 1, 12 * 9, dtype=np.float32).reshape(12, 9)
    inside = decode_image(encoded(Image.fromarray(values), "TIFF"))
    assert inside.flags == ("float", "grey")
    assert np.array_equal(np.asarray(inside.image)[..., 1], np.rint(values * 255).astype(np.uint8))
    bright = encoded(Image.fromarray(values * 3 - 1), "TIFF")
    with pytest.raises(MediaError, match=r"in \[0, 1\], got \[-1, 2\].*--clip") as caught:
        decode_image(bright)
    assert caught.value.reason == "unsupported_format"
    clipped = decode_image(bright, colours=Colours(clip=True))
    assert clipped.flags == ("clipped", "float", "grey")
    assert np.array_equal(np.asarray(clipped.image)[..., 0], np.rint(np.clip(values * 3 - 1, 0, 1) * 255).astype(np.uint8))
    values[0, 0] = np.nan
    with pytest.raises(MediaError, match="not finite"):
        decode_image(encoded(Image.fromarray(values), "TIFF"), colours=Colours(clip=True))
    assert Colours(clip=True).name == PLAIN.name + ",clipped"


def test_tensors_outside_the_unit_range_too() -> None:
    scorer, clipping = rewards.load("brightness"), rewards.load("brightness", colours=Colours(clip=True))
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 0.5
    for given in (pixels, list(pixels)):
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            scorer.score(given)
        assert torch.equal(clipping.score(given), scorer.score(pixels.clamp(0, 1)))


def test_large_pictures_wait_for_room() -> None:
    """Two that fit together pass; a third waits for both; one larger than all room passes alone; small ones never wait."""
    room, order, go = Room(3 * decoding.LARGE), [], threading.Event()

    def hold(name: str, pixels: int) -> None:
        with room() as admit:
            admit((pixels, 1))
            order.append(name)
            go.wait(20)

    threads = [threading.Thread(target=hold, args=(name, decoding.LARGE)) for name in "abc"]
    threads.append(threading.Thread(target=hold, args=("huge", 9 * decoding.LARGE)))
    for number, thread in enumerate(threads):
        thread.start()
        until = time.monotonic() + 5
        while len(order) <= min(number, 2) and time.monotonic() < until:
            time.sleep(0.001)
    hold_small = threading.Thread(target=hold, args=("small", decoding.LARGE - 1))
    hold_small.start()
    while "small" not in order:
        time.sleep(0.001)
    assert order == ["a", "b", "c", "small"] and room.used == 3 * decoding.LARGE
    go.set()
    for thread in (*threads, hold_small):
        thread.join()
    assert order[-1] == "huge" and room.used == 0
    with pytest.raises(KeyError), room() as admit:
        admit((decoding.LARGE, 1))
        raise KeyError
    assert room.used == 0


def test_large_pictures_are_not_kept_and_not_decoded_by_processes(
    decoders: ProcessDecoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [encoded(smooth(60, 50, seed)) for seed in range(3)] + [encoded(smooth(20, 20))]
    expected = rewards.load("brightness").score(files)
    monkeypatch.setattr(decoding, "LARGE", 3000)
    assert torch.equal(rewards.load("brightness").score([*files, files[0]])[:4], expected)
    large = load_picture(read_picture(files[0]), Wanted(rules={}, keep_image=True))
    small = load_picture(read_picture(files[3]), Wanted(rules={}, keep_image=True))
    assert large.image is None and large.again is not None and small.image is not None
    wide = encoded(Image.new("1", (8000, 8000)))  # 8 kB
    assert decoders.load([read_picture(wide)], Wanted(rules={"clip_tv:32": Preprocess("clip_tv", 32)})) == [None]


def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row in range(5):
        (folder / f"{row}.jpg").write_bytes(jpeg(300 + row, 260))
    (folder / "6.jpg").write_bytes(jpeg(300, 260)[:3000])
    Image.fromarray(np.full((9, 9), 1.5, np.float32)).save(folder / "7.tiff")

    def run(name: str, *options: str) -> tuple[list[dict[str, object]], dict[str, object]]:
        out = tmp_path / f"{name}.parquet"
        found = CliRunner().invoke(
            app, ["score", str(folder), "--reward", "tiny-clip", "--prompt", "a red circle", "--out", str(out), *options]
        )
        assert found.exit_code == 3, found.output
        table = pq.read_table(out)
        return table.to_pylist(), json.loads(table.schema.metadata[b"mmalign"])

    plain, _ = run("plain")
    same, _ = run("processes", "--decode-workers", "1")
    assert str(plain) == str(same)
    assert [row["error"] for row in plain[5:]] == ["tiny-clip:truncated_image", "tiny-clip:unsupported_format"]
    # The same output table: parts made with other pixels are not taken for these.
    cheap, facts = run("plain", "--decode", "draft2x", "--fast-preprocess", "--clip")
    assert facts["rewards"]["tiny-clip"]["card"]["preprocess"] == "clip_hf_u8tv+draft2x:32"  # type: ignore[index]
    assert all(one["tiny-clip"] != other["tiny-clip"] for one, other in zip(plain[:5], cheap[:5], strict=True))
    assert cheap[6]["status"] == "ok" and "clipped" in str(facts["colours"])
    refused = CliRunner().invoke(
        app, ["score", str(folder), "--reward", "brightness", "--processes", "2", "--decode-workers", "1"]
    )
    assert refused.exit_code == 2 and "accelerate launch" in refused.stderr.replace("\n", " ")


def test_processes_are_chosen_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with thousands of pictures, two cores short of all, and no more than shared memory holds."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    free = 10 << 30
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [suitable_processes(5000, cuda), suitable_processes(100, cuda), suitable_processes(5000, cpu)] == [14, 0, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert suitable_processes(5000, cuda) == 6
    free = 64 << 20  # what a container has without being asked
    assert suitable_processes(5000, cuda) == 0
    assert decoding_processes(1, None, "local") is None and decoding_processes(1, 3, "local") == 3
    assert decoding_processes(2, None, "local") == decoding_processes(1, None, "ray") == 0
