"""Resizing by matrix products: equal to Pillow bit for bit, and to the ordinary path of scoring whatever it was given."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign import rewards
from mmalign.rewards.launching import windows
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.resample import pass_order, weights
from mmalign.rewards.scorer import ScorerSet
from mmalign.rewards.staging import BEFORE, DeviceResize, interleaved
from tests.rewards.tiny_checkpoints import make_clip

CPU = torch.device("cpu")
SIZES = [(224, 224), (448, 300), (161, 400), (97, 640), (640, 97), (30, 41), (225, 224), (500, 700)]


def planes(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("name", ["clip_hf", "clip_tv", "blip_224", "hps_letterbox", "hps_letterbox_noaa"])
def test_every_rule_gives_pillows_pixels(name: str) -> None:
    rng = np.random.default_rng(1)
    for size in (96, 224):
        rule = Preprocess(name, size)
        for width, height in SIZES:
            # Black and white only: every overshoot of the filter is clipped somewhere.
            picture = Image.fromarray((rng.random((height, width, 3)) > 0.5).astype(np.uint8) * 255)
            assert rule.fits_device(picture.size)
            found, wanted = rule.from_planes(planes(picture)), rule.from_image(picture)
            assert found.dtype == wanted.dtype and torch.equal(found, wanted), (width, height)


def test_weights_by_hand() -> None:
    """Two to one: the cubic at 0.25, 0.75, 1.25 and 1.75, 56/64.. of it, summing to one in units of 2**-22."""
    found = weights(16, 8, 3, 1, CPU)[:, 0]
    cubic = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
    assert torch.equal(found[3:11], torch.from_numpy(np.round(cubic * 2**22)))
    assert found[:3].abs().sum() == 0 and found[11:].abs().sum() == 0


def test_the_order_of_the_passes_is_found_out_and_matters() -> None:
    """Squares shrink across first in every Pillow; where another order would differ, what is found agrees with Pillow."""
    assert pass_order((300, 300), (100, 100), (0, 0), 100) is False
    assert pass_order((300, 900), (100, 300), (0, 100), 100) in (False, True)


def test_equal_geometry_has_one_name() -> None:
    one, two = Preprocess("clip_hf", 224), Preprocess("clip_tv", 224)
    assert one.geometry((300, 300)) == two.geometry((300, 300))
    # 225 and 227 across: margins of 1 and 3, which the two rules halve differently.
    assert one.geometry((227, 224)) != two.geometry((227, 224))


def test_what_cannot_be_staged_goes_the_ordinary_way() -> None:
    rule = Preprocess("clip_hf", 32)
    large = Image.new("RGB", (2300, 2300))
    assert interleaved(large) is None
    stage = DeviceResize(CPU)
    assert [stage(large, {"x": rule}, b"x") for _ in range(BEFORE + 2)] == [None] * (BEFORE + 2)
    assert not rule.fits_device((1, 40_000_000)) and not Preprocess("hps_letterbox", 32).fits_device((300, 20))
    small = Image.new("RGB", (64, 48), "red")
    assert [stage(small, {"x": rule}, b"x") is None for _ in range(BEFORE + 2)] == [True] * BEFORE + [False] * 2


def test_a_letterbox_is_made_on_the_device_from_the_first_picture_on() -> None:
    """There it is rounded otherwise, so which it is must not depend on what was met before; with crops beside it, too."""
    crop, box = Preprocess("clip_hf", 32), Preprocess("hps_letterbox", 32)
    stage, picture = DeviceResize(CPU), Image.new("RGB", (64, 48), "red")
    keys = [found.keys for _ in range(BEFORE + 1) if (found := stage(picture, {"crop": crop, "box": box}, b"x")) is not None]
    assert keys == [{"box"}] * BEFORE + [{"crop", "box"}]
    long = Image.new("RGB", (300, 20))
    assert [stage(long, {"box": box}, b"x") for _ in range(BEFORE + 1)] == [None] * (BEFORE + 1)


def test_scores_are_the_same(
    clip_folder: Path, tmp_path: Path, pictures: list[Image.Image], prompts: list[str]
) -> None:
    """Files, pictures in memory, alpha, rotation and broken bytes, two rules at once, several windows."""
    rng = np.random.default_rng(3)
    noise = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(12)]
    files: list[object] = []
    for index, picture in enumerate(noise[:6]):
        exif = Image.Exif()
        exif[0x0112] = 1 + index
        picture.save(tmp_path / f"{index}.jpg", exif=exif, quality=90)
        files.append(tmp_path / f"{index}.jpg")
    noise[0].convert("RGBA").save(tmp_path / "alpha.png")
    entries = [*files, *noise, tmp_path / "alpha.png", b"junk", noise[3], *pictures]
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    torch.save({"weight": torch.ones(1, 24), "bias": torch.zeros(1)}, folder / "aesthetic.pth")
    loaded = rewards.load(["clipscore-raw", "aesthetic"], {"clipscore-raw": folder, "aesthetic": folder}, "cpu")

    def run(stage: DeviceResize | None) -> dict[str, torch.Tensor]:
        fresh = ScorerSet(loaded.backends)
        fresh.engine.reader.stage = stage
        return fresh.score(entries, "a red circle", batch_size=4, on_error="nan")

    plain, staged = run(None), run(DeviceResize(CPU))
    for name, values in plain.items():
        assert values.isnan().tolist() == [entry == b"junk" for entry in entries]
        torch.testing.assert_close(staged[name], values, atol=1e-6, rtol=0, equal_nan=True)


def test_windows_grow_and_cover_everything_once() -> None:
    assert windows(0, 16) == []
    assert windows(100, 16) == [(0, 4), (4, 12), (12, 28), (28, 60), (60, 92), (92, 100)]
    assert windows(3, 1) == [(0, 1), (1, 3)]


def test_the_last_block_at_one_position(tmp_path: Path) -> None:
    """What is pooled equals what a full last block gives, also for its gradient."""
    folder = tmp_path / "clip"
    folder.mkdir()
    make_clip(folder)
    net = rewards.load("tiny-clip", path=folder, device="cpu").backend.net  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    size = net.shape.image_size
    pixels = torch.randn(3, 3, size, size, generator=generator, requires_grad=True)
    short, whole = net.embed_images(pixels), net.vision.pool(net.vision(pixels))
    torch.testing.assert_close(short, whole, atol=1e-6, rtol=1e-5)
    first, second = (torch.autograd.grad(value.square().sum(), pixels)[0] for value in (short, whole))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-4)
