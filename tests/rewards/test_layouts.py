"""Checkpoints in every layout score as the library that wrote them computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmalign import rewards
from mmalign.errors import ModelError, RewardError
from mmalign.rewards.preprocess import Preprocess
from tests.rewards.tiny_checkpoints import ReleasedHead, make_clip, randomise, stack


def transformers_cosine(model: nn.Module, folder: Path, pixels: Tensor, prompts: list[str]) -> Tensor:
    from transformers import CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder)(prompts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=pixels)
    return (out.image_embeds * out.text_embeds).sum(-1)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [624, 2])
def test_transformers_layout(
    tmp_path: Path, pictures: list[Image.Image], prompts: list[str], activation: str, eos: int
) -> None:
    model = make_clip(tmp_path, activation=activation, eos=eos)
    expected = transformers_cosine(model, tmp_path, stack(pictures, Preprocess("clip_hf", 32)), prompts)
    for name, value in (
        ("pickscore", expected * np.exp(3.0)),
        ("clipscore", 100 * expected.clamp(min=0)),
        ("clipscore-raw", expected),
        ("tiny-clip", expected * np.exp(3.0)),
    ):
        scores = rewards.load(name, path=tmp_path).score(pictures, prompts)
        torch.testing.assert_close(scores, value, atol=2e-5, rtol=1e-5)
    cosine = rewards.load("pickscore", path=tmp_path, scale="cosine").score(pictures, prompts)
    torch.testing.assert_close(cosine, expected, atol=2e-6, rtol=0)


def test_hessel_prefix_and_factor(tmp_path: Path, pictures: list[Image.Image], prompts: list[str]) -> None:
    model = make_clip(tmp_path)
    texts = [f"A photo depicts {prompt}" for prompt in prompts]
    expected = transformers_cosine(model, tmp_path, stack(pictures, Preprocess("clip_hf", 32)), texts)
    scores = rewards.load("clipscore-hessel", path=tmp_path).score(pictures, prompts)
    torch.testing.assert_close(scores, 2.5 * expected.clamp(min=0), atol=1e-5, rtol=0)


def open_clip_model(folder: Path, *, quick_gelu: bool) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    model = open_clip.model.CLIP(**{**config, "quick_gelu": quick_gelu})
    randomise(model, 3)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return model.eval()


def open_clip_cosine(model: nn.Module, pixels: Tensor, prompts: list[str]) -> Tensor:
    import open_clip

    ids = open_clip.tokenizer.SimpleTokenizer()(prompts)
    with torch.no_grad():
        images, texts = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
    return (images * texts).sum(-1)


TRICKY = [
    "a “curly” quote’s",
    "",
    "x &amp;amp; y",
    "stop <|endoftext|> here",
    "word " * 200,
    "ﬁne ＡＢＣ",
    "你好 😀",
    "a",
]


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip_folder(tmp_path: Path, pictures: list[Image.Image], quick_gelu: bool) -> None:
    from safetensors.torch import save_file

    model = open_clip_model(tmp_path, quick_gelu=quick_gelu)
    save_file({name: value.contiguous() for name, value in model.state_dict().items() if name != "attn_mask"},
              tmp_path / "open_clip_model.safetensors")  # fmt: skip
    expected = open_clip_cosine(model, stack(pictures, Preprocess("clip_tv", 32)), TRICKY)
    found = rewards.load("clipscore-raw", path=tmp_path).score(pictures, TRICKY, details=True)
    torch.testing.assert_close(found.values, expected, atol=2e-6, rtol=0)
    assert found.truncated.tolist() == [False, False, False, False, True, False, False, False]
    assert found.flags[1] == ("empty_prompt",)


ODD = [
    ("vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type = 'avg'"),
    ("text_cfg", {"pool_type": "last"}, "text_cfg.pool_type = 'last'"),
    ("text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask"),
    ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "text_cfg.tokenizer_kwargs"),
    ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}}, None),
    ("text_cfg", {"norm_kwargs": {"eps": 0.01}}, None),
]


@pytest.mark.parametrize(("part", "setting", "words"), ODD)
def test_an_open_clip_setting_is_followed_or_refused(
    tmp_path: Path, pictures: list[Image.Image], part: str, setting: dict[str, Any], words: str | None
) -> None:
    open_clip_model(tmp_path, quick_gelu=False)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"][part] |= setting
    import open_clip

    model = open_clip.model.CLIP(**config["model_cfg"])
    randomise(model, 3)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    if words is not None:
        with pytest.raises(ModelError, match=words):
            rewards.load("clipscore-raw", path=tmp_path)
        return
    expected = open_clip_cosine(model.eval(), stack(pictures, Preprocess("clip_tv", 32)), TRICKY)
    torch.testing.assert_close(rewards.load("clipscore-raw", path=tmp_path).score(pictures, TRICKY), expected, atol=2e-6, rtol=0)


def test_pixels_that_a_checkpoint_wants_otherwise(tmp_path: Path) -> None:
    model = open_clip_model(tmp_path, quick_gelu=False)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": {"resize_mode": "squash"}}))
    with pytest.raises(ModelError, match="resize_mode = 'squash'"):
        rewards.load("clipscore-raw", path=tmp_path)
    rewards.load("hpsv2.1", path=tmp_path)  # prescribes its own
    folder = tmp_path / "transformers"
    make_clip(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"resample": 2, "do_center_crop": False}))
    with pytest.raises(ModelError, match="do_center_crop = False, resample = 2"):
        rewards.load("clipscore", path=folder)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_hps_release_file(tmp_path: Path, pictures: list[Image.Image], prefix: str) -> None:
    model = open_clip_model(tmp_path, quick_gelu=False)
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": {prefix + name: value for name, value in model.state_dict().items()}}, file)
    expected = open_clip_cosine(model, stack(pictures, Preprocess("hps_letterbox", 32)), TRICKY)
    scores = rewards.load("hpsv2.1", path=file).score(pictures, TRICKY)
    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=0)
    legacy = rewards.load("hpsv2.0", path=tmp_path, legacy_resize=True).score(pictures, TRICKY)
    assert not torch.allclose(legacy, scores, atol=1e-3)


def test_aesthetic_heads(tmp_path: Path, pictures: list[Image.Image]) -> None:
    model = make_clip(tmp_path)
    head = ReleasedHead(24).eval()
    torch.save(head.state_dict(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    with torch.no_grad():
        features = model.get_image_features(stack(pictures, Preprocess("clip_tv", 32))).pooler_output
        embedding = features / features.norm(dim=-1, keepdim=True)
        expected = head.layers(embedding)[:, 0]
    scorer = rewards.load("aesthetic", path=tmp_path)
    torch.testing.assert_close(scorer.score(pictures), expected, atol=2e-6, rtol=0)

    linear = nn.Linear(24, 1)
    torch.save(linear.state_dict(), tmp_path / "v1.pth")
    with torch.no_grad():
        expected = linear(embedding)[:, 0]
    scores = rewards.load("aesthetic-v1-l14", path=tmp_path, head=tmp_path / "v1.pth").score(pictures)
    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=0)


def test_aesthetic_refuses_the_sibling_with_activations(tmp_path: Path) -> None:
    make_clip(tmp_path)
    other = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1))
    torch.save({f"layers.{name}": value for name, value in other.state_dict().items()}, tmp_path / "relu.pth")
    with pytest.raises(ModelError, match="not a linear aesthetic head"):
        rewards.load("aesthetic", path=tmp_path, head=tmp_path / "relu.pth")
    with pytest.raises(RewardError, match="needs its head file"):
        rewards.load("aesthetic", path=tmp_path)


def test_a_number_of_heads_that_cannot_be_known_is_not_guessed(tmp_path: Path) -> None:
    model = open_clip_model(tmp_path, quick_gelu=False)
    (tmp_path / "open_clip_config.json").unlink()
    torch.save(model.state_dict(), tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ModelError, match="48 wide network is not in its weights; put its open_clip_config.json"):
        rewards.load("hpsv2.1", path=tmp_path / "HPS_v2.1_compressed.pt")


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    state["extra.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing: vision.projection.weight; unexpected: extra.weight"):
        rewards.load("pickscore", path=tmp_path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(ModelError):
        rewards.load("hpsv2.1", path=tmp_path / "HPS_v2.1_compressed.pt")
    assert not (tmp_path / "ran").exists()
