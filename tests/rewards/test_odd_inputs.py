"""Odd pictures and prompts score as the libraries' own modules do on the stated conversion, in every CLIP layout."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mmalign import assets, rewards
from mmalign.rewards import batching
from mmalign.rewards.batching import batch_for, in_batches
from mmalign.rewards.dual import DualEncoder
from tests.rewards.test_layouts import open_clip_cosine, open_clip_model
from tests.rewards.tiny_checkpoints import make_clip

PROMPTS = ["a “curly” quote’s", "", "stop <|endoftext|> here", "red circle " * 60, "a red circle", "a ＡＢＣ", "x &amp; y", "two",
           "a star", "<|startoftext|>"]  # fmt: skip


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def odd_pictures() -> list[tuple[bytes, Image.Image]]:
    """Files, and the RGB picture each stands for, converted here with NumPy alone where Pillow is not the definition."""
    rng = np.random.default_rng(3)
    colour = rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (40, 52, 1), dtype=np.uint8)
    deep = rng.integers(0, 65536, (40, 52), dtype=np.uint16)
    shares = alpha.astype(np.float64) / 255
    over_white = np.rint(colour * shares + 255 * (1 - shares)).astype(np.uint8)
    palette = Image.fromarray(colour).quantize(12)
    bits = rng.integers(0, 2, (40, 52)).astype(bool)
    exif = Image.Exif()
    exif[0x0112] = 8
    cmyk = Image.fromarray(colour).convert("CMYK")
    wide, tall = (rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((4, 1500), (1200, 5)))
    return [
        (encoded(Image.fromarray(np.dstack([colour, alpha]), "RGBA")), Image.fromarray(over_white)),
        (encoded(palette), palette.convert("RGB")),
        (encoded(Image.fromarray(deep)), Image.fromarray(np.dstack([np.rint(deep / 257.0).astype(np.uint8)] * 3))),
        (encoded(Image.fromarray(colour), exif=exif), Image.fromarray(np.ascontiguousarray(np.rot90(colour)))),
        (encoded(cmyk, "TIFF"), cmyk.convert("RGB")),
        (encoded(Image.fromarray(wide)), Image.fromarray(wide)),
        (encoded(Image.fromarray(tall)), Image.fromarray(tall)),
        (encoded(Image.fromarray(bits)), Image.fromarray(np.dstack([bits.astype(np.uint8) * 255] * 3))),
        (encoded(Image.fromarray(colour[..., 0])), Image.fromarray(np.dstack([colour[..., 0]] * 3))),
        (encoded(Image.fromarray(colour[:1, :1])), Image.fromarray(colour[:1, :1])),
    ]


def by_transformers(folder: Path, model: nn.Module, pictures: list[Image.Image], *, special: bool) -> Tensor:
    """Cosines from transformers' processor, tokenizer and model; `special` lets special tokens in prompts act."""
    from tokenizers import Tokenizer
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = torch.cat([processor(images=item, return_tensors="pt").pixel_values for item in pictures])
    length = model.config.text_config.max_position_embeddings
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    out = []
    with torch.no_grad():
        for row, prompt in zip(pixels, PROMPTS, strict=True):
            if special:
                loaded = CLIPTokenizer.from_pretrained(folder)
                ids = loaded(prompt, truncation=True, max_length=length, return_tensors="pt").input_ids
            else:
                body = plain.encode(prompt, add_special_tokens=False).ids[: length - 2]
                ids = torch.tensor([[623, *body, 624]])
            found = model(input_ids=ids, pixel_values=row[None])
            out.append((found.image_embeds * found.text_embeds).sum())
    return torch.stack(out)


def test_transformers_layout(tmp_path: Path) -> None:
    files, pictures = zip(*odd_pictures(), strict=True)
    model = make_clip(tmp_path)
    for special in (False, True):
        scorer = rewards.load("clipscore-raw", path=tmp_path, device="cpu", allow_special_tokens=special)
        found = scorer.score(list(files), PROMPTS, details=True)
        expected = by_transformers(tmp_path, model, list(pictures), special=special)
        torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=0)
    assert found.truncated[3] and not found.truncated[[1, 4, 7, 8]].any()
    assert "alpha" in found.flags[0] and "16bit" in found.flags[2] and "exif_rotated" in found.flags[3]
    assert "empty_prompt" in found.flags[1] and "special_token" in found.flags[2] and "special_token" in found.flags[9]
    again = rewards.load("clipscore-raw", path=tmp_path, device="cpu").score(list(pictures), PROMPTS)
    plain = rewards.load("clipscore-raw", path=tmp_path, device="cpu").score(list(files), PROMPTS, batch_size=3)
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=0)


def test_open_clip_and_hps_layouts(tmp_path: Path) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    functional = pytest.importorskip("torchvision.transforms.functional")
    files, pictures = zip(*odd_pictures(), strict=True)
    model = open_clip_model(tmp_path, quick_gelu=False)
    save_file({name: value.contiguous() for name, value in model.state_dict().items() if name != "attn_mask"},
              tmp_path / "open_clip_model.safetensors")  # fmt: skip
    torch.save({"state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    bicubic = transforms.InterpolationMode.BICUBIC
    normal = transforms.Normalize(mean, std)
    crop = transforms.Compose([transforms.Resize(32, interpolation=bicubic), transforms.CenterCrop(32)])
    pixels = torch.stack([normal(functional.to_tensor(crop(item))) for item in pictures])
    found = rewards.load("clipscore-raw", path=tmp_path, device="cpu").score(list(files), PROMPTS)
    torch.testing.assert_close(found, open_clip_cosine(model, pixels, PROMPTS), atol=1e-4, rtol=0)
    boxed = []
    for item in pictures:
        width, height = item.size
        size = [max(1, round(32 * height / max(item.size))), max(1, round(32 * width / max(item.size)))]
        small = functional.resize(functional.to_tensor(item), size, bicubic, antialias=True)
        right, down = 32 - size[1], 32 - size[0]
        boxed.append(normal(functional.pad(small, [right // 2, down // 2, right - right // 2, down - down // 2])))
    found = rewards.load("hpsv2.1", path=tmp_path / "HPS_v2.1_compressed.pt", device="cpu").score(list(files), PROMPTS)
    torch.testing.assert_close(found, open_clip_cosine(model, torch.stack(boxed), PROMPTS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-judge"])
def test_the_embedded_rewards_are_their_own_weights(name: str) -> None:
    from transformers import CLIPModel

    files, pictures = zip(*odd_pictures(), strict=True)
    folder = assets.path(name)
    model = CLIPModel.from_pretrained(folder).eval()
    expected = model.logit_scale.exp().detach() * by_transformers(folder, model, list(pictures), special=False)
    found = rewards.load(name, device="cpu").score(list(files), PROMPTS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert found.std() > 0.1


EMBEDDED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "open_clip", "transformers", "timm"):
            raise ImportError("blocked " + name)

if sys.argv[1] == "blocked":
    sys.meta_path.insert(0, Blocker())
else:
    import open_clip, torchvision
import numpy as np
from mmalign import rewards
picture = np.arange(40 * 32 * 3, dtype=np.uint8).reshape(1, 40, 32, 3)
print(*(float(rewards.load(name, device="cpu").score(picture, "a red star")[0]) for name in ("tiny-clip", "tiny-judge")))
"""


def test_embedded_rewards_with_and_without_the_optional_libraries() -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("torchvision")
    found = []
    for mode in ("blocked", "present"):
        done = subprocess.run([sys.executable, "-c", EMBEDDED, mode], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append([float(item) for item in done.stdout.split()])
    assert found[0] == found[1] and len(found[0]) == 2


def png_claiming(width: int, height: int, *extra: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(bytes(10_000_000), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in chunks)


def test_bombs_are_refused_with_a_reason() -> None:
    text = (b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(80_000_000), 9))
    files = [
        png_claiming(30_000, 30_000),
        png_claiming(30_000, 10),
        png_claiming(8, 8, text),
        png_claiming(2**31 - 1, 1),
    ]
    found = rewards.load("brightness").score(files, on_error="nan", details=True)
    assert [found.errors[0], found.errors[1], found.errors[3]] == ["too_large"] * 3
    assert found.errors[2] in (None, "too_large", "undecodable_image", "truncated_image")
    assert found.values[found.ok.logical_not()].isnan().all()


def test_batches_follow_memory_and_padding_changes_nothing(clip_folder: Path) -> None:
    assert [batch_for(free, 2**20) for free in (2**20, 2**27, 2**28, 3 * 2**28, 2**40)] == [16, 64, 128, 256, 512]
    assert batch_for(2**30, 0) == 128
    backend = rewards.load("clipscore-raw", path=clip_folder, device="cpu").backend
    assert isinstance(backend, DualEncoder) and backend.bytes_per_image() > 4 * 17 * 48 * 8
    pixels = list(torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    shapes: list[int] = []

    def encode(batch: Tensor) -> tuple[Tensor, ...]:
        shapes.append(len(batch))
        return (backend.encode_images(batch),)

    padded = torch.stack([found for (found,) in in_batches(backend, encode, pixels, 4, pad=True)])
    plain = torch.stack([found for (found,) in in_batches(backend, encode, pixels, 4)])
    assert shapes == [4, 4, 4, 1]
    torch.testing.assert_close(padded, plain, atol=1e-6, rtol=0)


def test_less_memory_means_smaller_batches(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = rewards.load("clipscore-raw", path=clip_folder, device="cpu").backend
    assert isinstance(backend, DualEncoder)
    monkeypatch.setattr(batching.torch.cuda, "empty_cache", lambda: None)
    shapes: list[int] = []

    def encode(batch: Tensor) -> tuple[Tensor, ...]:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no room")
        shapes.append(len(batch))
        return (backend.encode_images(batch),)

    pixels = list(torch.zeros(5, 3, 32, 32, dtype=torch.uint8))
    assert len(in_batches(backend, encode, pixels, 8)) == 5 and shapes == [2, 2, 1]


@pytest.mark.slow
def test_compiled_encoders_score_the_same(clip_folder: Path, pictures: list[Image.Image], prompts: list[str]) -> None:
    plain = rewards.load("clipscore-raw", path=clip_folder, device="cpu").score(pictures, prompts, batch_size=4)
    scorer = rewards.load("clipscore-raw", path=clip_folder, device="cpu", compile=True)
    try:
        found = scorer.score(pictures[:6], prompts[:6], batch_size=4)
    except RuntimeError as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip(f"no compiler: {error}")
    torch.testing.assert_close(found, plain[:6], atol=1e-5, rtol=0)
    assert len(scorer.engine.graphs) == 1 and json.dumps(dict(scorer.backend.record()))


def test_colour_options_reach_every_path(tmp_path: Path) -> None:
    """From Python by file and in memory, by a set and by its single rewards; alpha dropped is another score."""
    from mmalign.media import Colours

    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 256, (40, 32, 4), dtype=np.uint8)
    picture, bare = Image.fromarray(pixels, "RGBA"), Image.fromarray(pixels[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "alpha.png", exif=exif)
    plain = rewards.load("tiny-clip", device="cpu").score([bare], "a star")
    given = Colours(alpha="drop", exif=False)
    for entry in (picture, tmp_path / "alpha.png"):
        found = rewards.load(["tiny-clip", "brightness"], device="cpu", colours=given)
        assert torch.equal(found.score([entry], "a star")["tiny-clip"], plain)
        assert torch.equal(found["tiny-clip"].score([entry], "a star"), plain)
        assert not torch.equal(rewards.load("tiny-clip", device="cpu").score([entry], "a star"), plain)
