"""ImageReward and MPS against their networks written out from the libraries' own modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from mmalign import rewards
from mmalign.errors import ModelError
from mmalign.rewards.preprocess import Preprocess
from tests.rewards.tiny_checkpoints import ReleasedHead, make_clip, randomise, stack

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "blue", "square", "##s", "two", "star", "green",
              "left", "of", "[", "]", "sep", ","]  # fmt: skip


class Reference(nn.Module):
    """ImageReward from timm's ViT and transformers' BLIP text model."""

    def __init__(self) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        from transformers import BlipTextConfig
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.vit = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool=""
        )
        config = BlipTextConfig(
            vocab_size=len(VOCABULARY), hidden_size=24, encoder_hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=64, layer_norm_eps=1e-12, hidden_act="gelu", is_decoder=True,
        )  # fmt: skip
        self.text = BlipTextModel(config, add_pooling_layer=False)
        self.head = ReleasedHead(24)
        randomise(self, 9)
        self.eval()

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.vit.forward_features(pixels)
        atts = torch.ones(states.shape[:2], dtype=torch.long)
        out = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=states, encoder_attention_mask=atts,
                        is_decoder=False)  # fmt: skip
        raw = self.head.layers(out.last_hidden_state[:, 0])[:, 0]
        return (raw - 0.16717362830052426) / 1.0333394966054072

    def write(self, folder: Path) -> None:
        state = {f"blip.visual_encoder.{name}": value for name, value in self.vit.state_dict().items()}
        state |= {f"blip.text_encoder.{name}": value for name, value in self.text.state_dict().items()}
        state |= {f"mlp.{name}": value for name, value in self.head.state_dict().items()}
        state |= {"blip.vision_proj.weight": torch.zeros(2, 32), "blip.text_proj.bias": torch.zeros(2)}
        torch.save(state, folder / "ImageReward.pt")
        (folder / "med_config.json").write_text(json.dumps({"num_attention_heads": 3, "layer_norm_eps": 1e-12}))
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY))


PROMPTS = [
    "a red circle",
    "two blue squares",
    "",
    "A Green star, left of a red CIRCLE",
    "a " * 50,
    "zebra",
    "[SEP] a",
    "a",
]


def test_imagereward(tmp_path: Path, pictures: list[Image.Image]) -> None:
    reference = Reference()
    reference.write(tmp_path)
    index = {token: number for number, token in enumerate(VOCABULARY)}
    bodies = [["a", "red", "circle"], ["two", "blue", "square", "##s"], [],
              ["a", "green", "star", ",", "left", "of", "a", "red", "circle"], ["a"] * 33, ["[UNK]"],
              ["[", "sep", "]", "a"], ["a"]]  # fmt: skip
    ids, mask = torch.zeros(8, 35, dtype=torch.long), torch.zeros(8, 35, dtype=torch.long)
    for row, body in enumerate(bodies):
        tokens = [index[token] for token in ["[CLS]", *body, "[SEP]"]]
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    with torch.no_grad():
        expected = reference(stack(pictures, Preprocess("blip_224", 32)), ids, mask)
    scorer = rewards.load("imagereward", path=tmp_path, vision_heads=2)
    found = scorer.score(pictures, PROMPTS, details=True)
    assert expected.std() > 0.01
    torch.testing.assert_close(found.values, expected, atol=2e-4, rtol=1e-5)
    assert found.truncated.tolist() == [False] * 4 + [True] + [False] * 3
    one_by_one = rewards.load("imagereward", path=tmp_path, vision_heads=2).score(pictures, PROMPTS, batch_size=1)
    torch.testing.assert_close(one_by_one, found.values, atol=1e-5, rtol=1e-5)


def test_imagereward_keys_are_strict(tmp_path: Path) -> None:
    Reference().write(tmp_path)
    state = torch.load(tmp_path / "ImageReward.pt", weights_only=True)
    del state["mlp.layers.7.bias"]
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(ModelError, match="missing: mlp.layers.7.bias"):
        rewards.load("imagereward", path=tmp_path, vision_heads=2)


HEADS, HEAD, DIM = 2, 8, 24


def mps_state(folder: Path) -> nn.Module:
    model = make_clip(folder, activation="gelu", eos=2)
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    state = {f"model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    for layer in range(2):
        cross, own = f"cross_model.layers.{layer}.0.fn", f"cross_model.layers.{layer}.1.fn"
        state |= {
            f"{cross}.norm.weight": 1 + draw(DIM), f"{cross}.norm.bias": torch.zeros(DIM),
            f"{cross}.to_q.weight": draw(HEADS * HEAD, DIM), f"{cross}.to_kv.weight": draw(2 * HEAD, DIM),
            f"{cross}.to_out.weight": draw(DIM, HEADS * HEAD), f"{cross}.ff.0.weight": draw(8 * DIM, DIM),
            f"{cross}.ff.2.weight": draw(DIM, 4 * DIM), f"{own}.norm.weight": 1 + draw(DIM),
            f"{own}.norm.bias": torch.zeros(DIM), f"{own}.rotary_emb.inv_freq": torch.ones(HEAD // 2),
            f"{own}.fused_attn_ff_proj.weight": draw(HEADS * HEAD + 2 * HEAD + 8 * DIM, DIM),
            f"{own}.attn_out.weight": draw(DIM, HEADS * HEAD), f"{own}.ff_out.1.weight": draw(DIM, 4 * DIM),
        }  # fmt: skip
    save_file(state, folder / "MPS_overall_checkpoint.safetensors")
    (folder / "model.safetensors").unlink()
    return model


def gated(states: torch.Tensor) -> torch.Tensor:
    value, gate = states.chunk(2, dim=-1)
    return value * gate * torch.sigmoid(gate)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Per head loops over one shared key and value head, [T, H*d]."""
    heads = []
    for head in range(HEADS):
        logits = query[:, head * HEAD : (head + 1) * HEAD] @ key.T * HEAD**-0.5
        heads.append(torch.softmax(logits.masked_fill(~allowed, -torch.inf), dim=-1) @ value)
    return torch.cat(heads, dim=-1)


def rotate(states: torch.Tensor) -> torch.Tensor:
    out = states.clone()
    for position in range(len(states)):
        for pair in range(HEAD // 2):
            angle = torch.tensor(position * 10000.0 ** (-2 * pair / HEAD), dtype=torch.float64)
            first, second = states[position, pair], states[position, pair + HEAD // 2]
            out[position, pair] = first * angle.cos() - second * angle.sin()
            out[position, pair + HEAD // 2] = second * angle.cos() + first * angle.sin()
    return out


def mps_reference(model: nn.Module, state: dict, pixels: torch.Tensor, ids: torch.Tensor, condition: torch.Tensor,
                  threshold: float) -> torch.Tensor:  # fmt: skip
    """One row in float64, operation by operation."""
    with torch.no_grad():
        text = model.text_model(ids)
        tokens, pooled = (model.text_projection(value)[0].double() for value in (text[0], text[1]))
        wanted = model.text_projection(model.text_model(condition)[0])[0].double()
        image = model.visual_projection(model.vision_model(pixels)[0])[0].double()
    nearest = (tokens @ wanted.T).amax(-1)
    allowed = nearest / nearest.max() > threshold
    state = {name: value.double() for name, value in state.items()}
    for layer in range(2):
        cross, own = f"cross_model.layers.{layer}.0.fn", f"cross_model.layers.{layer}.1.fn"
        normed = nn.functional.layer_norm(image, (DIM,), state[f"{cross}.norm.weight"])
        key, value = (tokens @ state[f"{cross}.to_kv.weight"].T).chunk(2, dim=-1)
        mixed = attend(normed @ state[f"{cross}.to_q.weight"].T, key, value, allowed)
        image = (image + mixed @ state[f"{cross}.to_out.weight"].T
                 + gated(normed @ state[f"{cross}.ff.0.weight"].T) @ state[f"{cross}.ff.2.weight"].T)  # fmt: skip
        normed = nn.functional.layer_norm(image, (DIM,), state[f"{own}.norm.weight"])
        fused = normed @ state[f"{own}.fused_attn_ff_proj.weight"].T
        query, key, value, gate = fused.split((HEADS * HEAD, HEAD, HEAD, 8 * DIM), dim=-1)
        query = torch.cat([rotate(part) for part in query.split(HEAD, dim=-1)], dim=-1)
        mixed = attend(query, rotate(key), value, torch.ones(len(image), dtype=torch.bool))
        image = image + mixed @ state[f"{own}.attn_out.weight"].T + gated(gate) @ state[f"{own}.ff_out.1.weight"].T
    return model.logit_scale.exp() * torch.cosine_similarity(image[0], pooled, dim=0)


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.98])
def test_mps(tmp_path: Path, pictures: list[Image.Image], prompts: list[str], threshold: float) -> None:
    from transformers import CLIPTokenizer

    model = mps_state(tmp_path)
    state = load_file(tmp_path / "MPS_overall_checkpoint.safetensors")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)

    def ids(text: str) -> torch.Tensor:
        return tokenizer(text, padding="max_length", truncation=True, max_length=20, return_tensors="pt").input_ids

    pixels = stack(pictures, Preprocess("clip_hf", 32))
    condition = "light, color, red, circle"
    expected = torch.stack([
        mps_reference(model, state, pixels[row : row + 1], ids(prompts[row]), ids(condition), threshold)
        for row in range(len(prompts))
    ])  # fmt: skip
    scorer = rewards.load("mps", path=tmp_path, threshold=threshold, condition=condition)
    torch.testing.assert_close(scorer.score(pictures, prompts), expected.float(), atol=1e-4, rtol=1e-5)
    alone = torch.cat([scorer.score([picture], prompt) for picture, prompt in zip(pictures, prompts, strict=True)])
    torch.testing.assert_close(alone, expected.float(), atol=1e-4, rtol=1e-5)


def test_mps_thresholds_matter(tmp_path: Path, pictures: list[Image.Image], prompts: list[str]) -> None:
    mps_state(tmp_path)
    low, high = (rewards.load("mps", path=tmp_path, threshold=value).score(pictures, prompts) for value in (0.01, 0.98))
    assert (low - high).abs().max() > 1e-3
