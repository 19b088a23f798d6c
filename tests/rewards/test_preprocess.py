"""Every preprocessing rule against the library it stands for."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.media import Colours, decode_image
from mmalign.rewards.preprocess import Preprocess

SIZES = [(142, 80), (80, 142), (39, 32), (35, 32), (67, 32), (20, 12), (56, 30), (300, 41), (1, 1), (32, 32), (5, 64),
         (4, 1600), (1600, 4)]  # fmt: skip


def picture(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_tv_is_torchvision(height: int, width: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    image = picture(height, width)
    reference = transforms.Compose(
        [transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32)]
    )(image)
    assert np.array_equal(Preprocess("clip_tv", 32).from_image(image).permute(1, 2, 0).numpy(), np.asarray(reference))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_hf_is_the_pillow_processor(height: int, width: int) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False, do_rescale=False
    )
    image = picture(height, width)
    reference = processor(image, return_tensors="np").pixel_values[0]
    assert np.array_equal(Preprocess("clip_hf", 32).from_image(image).numpy(), reference.astype(np.uint8))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("antialias", [True, False])
def test_hps_letterbox_is_torchvision_on_floats(height: int, width: int, antialias: bool) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = picture(height, width)
    pixels = functional.to_tensor(image)
    scale = 32 / max(height, width)
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    if size != [height, width]:
        pixels = functional.resize(pixels, size, functional.InterpolationMode.BICUBIC, antialias=antialias)
    right, bottom = 32 - size[1], 32 - size[0]
    pixels = functional.pad(pixels, [right // 2, bottom // 2, right - right // 2, bottom - bottom // 2])
    rule = Preprocess("hps_letterbox" if antialias else "hps_letterbox_noaa", 32)
    torch.testing.assert_close(rule.from_image(image), pixels, atol=1e-6, rtol=0)


def test_crop_offset_rules_differ_when_the_margin_is_three_mod_four() -> None:
    image = picture(35, 32)  # margin 3: floor gives 1, half-to-even of 1.5 gives 2
    floor, even = Preprocess("clip_hf", 32).from_image(image), Preprocess("clip_tv", 32).from_image(image)
    assert torch.equal(floor[:, 1:], even[:, :-1])


@pytest.mark.parametrize("mode", ["P", "1", "CMYK", "L", "RGB"])
def test_blip_resizes_before_it_converts(mode: str) -> None:
    """The released transform's steps: resize, crop, then RGB. Nearest neighbours for palettes show the order."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    plain = picture(56, 83)
    given = plain.quantize(9) if mode == "P" else plain.convert(mode)
    if mode == "CMYK":
        values = np.random.default_rng(0).integers(0, 256, (56, 83, 4), dtype=np.uint8)
        given = Image.fromarray(values, "CMYK")  # with black, so that conversion is not linear
    buffer = io.BytesIO()
    given.save(buffer, format="TIFF" if mode == "CMYK" else "PNG")
    cut = transforms.Compose(
        [transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32)]
    )(given)
    decoded = decode_image(buffer.getvalue(), keep_stored=True)
    found = Preprocess("blip_224", 32).from_image(decoded.image, decoded.stored).permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(cut.convert("RGB")))
    after = Preprocess("clip_tv", 32).from_image(decoded.image).permute(1, 2, 0).numpy()
    assert (mode in ("L", "RGB")) == np.array_equal(found, after)


def test_beyond_all_sense_a_picture_still_becomes_a_square() -> None:
    rule = Preprocess("clip_hf", 224)
    band = np.linspace(0, 255, 16000).astype(np.uint8)
    found = rule.from_image(Image.fromarray(np.dstack([band[:, None]] * 3)))
    assert found.shape == (3, 224, 224) and found.float().mean().item() == pytest.approx(127.5, abs=2)


@pytest.mark.parametrize("name", ["clip_hf", "clip_tv", "hps_letterbox"])
def test_tensor_twin_is_the_identity_where_sizes_fit(name: str) -> None:
    image = picture(32, 32)
    rule = Preprocess(name, 32)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    found = rule.from_image(image).float() / (1 if name.startswith("hps") else 255)
    torch.testing.assert_close(rule.from_tensor(pixels[None])[0], found, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["clip_hf", "hps_letterbox"])
def test_tensor_twin_follows_the_picture_rule(name: str) -> None:
    base = Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 48))
    pixels = torch.from_numpy(np.asarray(base).copy()).permute(2, 0, 1).float() / 255
    rule = Preprocess(name, 32)
    found = rule.from_image(base).float() / (1 if name.startswith("hps") else 255)
    assert (rule.from_tensor(pixels[None])[0] - found).abs().max() < 2 / 255


def test_a_grey_colour_key_is_no_alpha_where_alpha_is_dropped() -> None:
    """As the released code: resized as grey, converted afterwards. Elsewhere the key is alpha before anything is mixed."""
    grey = picture(40, 60).convert("L")
    buffer = io.BytesIO()
    grey.save(buffer, "PNG", transparency=128)
    given = Colours(alpha="drop")
    found = decode_image(buffer.getvalue(), keep_stored=True, colours=given)
    rule = Preprocess("blip_224", 32)
    assert torch.equal(rule.from_image(found.image, found.stored, given), rule.from_image(grey.convert("RGB")))
    kept = decode_image(buffer.getvalue(), keep_stored=True)
    assert kept.stored is not None and kept.stored.mode == "RGBA"
