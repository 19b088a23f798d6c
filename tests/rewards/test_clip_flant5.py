"""CLIP-FlanT5 in its release's layout: scores against transformers' T5 and CLIP put together by hand, in one padded batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn

from mmalign import rewards
from mmalign.errors import ModelError
from mmalign.rewards import clip_flant5
from mmalign.rewards.preprocess import CLIP_MEAN, CLIP_STD
from tests.fixtures.tiny import _t5_tokenizer as tiny_tokenizer
from tests.rewards.tiny_checkpoints import randomise

NAME = "vqascore-flant5-xl"
PROMPTS = ["a red circle", "two stars on white", "Großes “b” <image> </s>", "", "red " * 400]


class Release:
    """The parts, as their own classes."""

    def __init__(self) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

        torch.manual_seed(0)
        self.tokenizer = tiny_tokenizer()
        self.t5 = T5ForConditionalGeneration(T5Config(
            d_model=24, d_kv=6, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=len(self.tokenizer) + 7,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
        ))  # fmt: skip
        self.tower = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14,
            hidden_act="quick_gelu",
        ))  # fmt: skip
        self.projector = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 24))
        self.t5.lm_head.weight = nn.Parameter(torch.randn_like(self.t5.shared.weight))  # Flan-T5 has an output layer of its own
        for seed, part in enumerate((self.tower, self.projector, self.t5)):
            randomise(part, seed)
            part.eval()

    def save(self, folder: Path) -> None:
        state = {name: value for name, value in self.t5.state_dict().items() if not name.endswith("embed_tokens.weight")}
        state["embed_tokens.weight"] = state["shared.weight"].clone()
        state |= {f"mm_projector.{name}": value for name, value in self.projector.state_dict().items()}
        for name, value in self.tower.state_dict().items():
            state[f"vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = value
        state["vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        folder.mkdir()
        save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")
        config = {**self.t5.config.to_dict(), "model_type": "clip_t5", "mm_hidden_size": 16, "mm_projector_type": "mlp2x_gelu"}
        # As published: written by a transformers that had no other word for it.
        config |= {"tie_word_embeddings": False}
        del config["scale_decoder_outputs"]
        (folder / "config.json").write_text(json.dumps(config))
        self.tokenizer.save_pretrained(folder)
        self.tower.config.save_pretrained(folder / "tower")

    @torch.no_grad()
    def scores(self, pictures: list[Image.Image], prompts: list[str]) -> Tensor:
        """One padded batch, masked where the released code masks, the loss of each row."""
        plain = self.tokenizer.backend_tokenizer
        plain.encode_special_tokens = True
        pixels = []
        for picture in pictures:
            square = ImageOps.pad(picture, (max(picture.size),) * 2, color=(122, 116, 104)) if picture.width != picture.height \
                else picture  # fmt: skip
            small = square.resize((28, 28), Image.Resampling.BICUBIC)
            values = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
            pixels.append((values - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None])
        seen = self.projector(self.tower(torch.stack(pixels), output_hidden_states=True).hidden_states[1 + 1][:, 1:])
        table = self.t5.shared
        before = torch.tensor(plain.encode(clip_flant5.SYSTEM + " USER: ").ids)
        read, masks = [], []
        for picture, prompt in zip(seen, prompts, strict=True):
            question = f'\nDoes this figure show "{prompt}"? Please answer yes or no. ASSISTANT: '
            behind = torch.tensor(plain.encode(question).ids[: clip_flant5.LONGEST - len(before) - 1])
            read.append(torch.cat([table(before), picture, table(behind)]))
            masks.append(torch.cat([before != 2, torch.ones(len(picture), dtype=torch.bool), behind != 2]))
        padded = nn.utils.rnn.pad_sequence(read, batch_first=True)
        mask = nn.utils.rnn.pad_sequence(masks, batch_first=True).long()
        labels = torch.tensor(plain.encode("Yes").ids)
        logits = self.t5(inputs_embeds=padded, attention_mask=mask, labels=labels.repeat(len(read), 1)).logits
        return torch.stack([(-nn.functional.cross_entropy(row, labels)).exp() for row in logits[..., : len(self.tokenizer)]])


@pytest.fixture(scope="module", autouse=True)
def shorter() -> Iterator[None]:
    """Two thousand tokens take seconds; the cut is the same at four hundred."""
    assert clip_flant5.LONGEST == 2048
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_flant5, "LONGEST", 400)
        yield


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    draws = np.random.default_rng(4)
    sizes = [(40, 40), (30, 52), (52, 30), (28, 28), (33, 32)]
    return [Image.fromarray(draws.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]) -> tuple[Path, Tensor]:
    """A folder, and what the parts say themselves."""
    made, folder = Release(), tmp_path_factory.mktemp("release") / "clip-flant5"
    made.save(folder)
    return folder, made.scores(pictures, PROMPTS)


def test_scores_are_those_of_the_parts(release: tuple[Path, Tensor], pictures: list[Image.Image]) -> None:
    folder, expected = release
    scorer = rewards.load(NAME, folder, "cpu", "fp32", tower=folder / "tower")
    found = scorer.score(pictures, PROMPTS, details=True)
    torch.testing.assert_close(found.values, expected, atol=0, rtol=1e-4)
    assert found.values.min() > 0 and found.values.max() < 1 and found.values.std() > 2e-4
    assert found.truncated.tolist() == [False, False, False, False, True]
    for size in (1, 2):
        torch.testing.assert_close(scorer.score(pictures, PROMPTS, batch_size=size), found.values, atol=1e-6, rtol=0)
    order = [3, 1, 4, 0, 2]
    turned = scorer.score([pictures[i] for i in order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(turned, found.values[order], atol=1e-6, rtol=0)
    assert scorer.card.preprocess == "llava_pad28" and len(scorer.backend.record()["weights"]) == 24
    other = rewards.load(NAME, folder, "cpu", "fp32", tower=folder / "tower", answer="No", question="{prompt}: is it there?")
    assert not torch.allclose(other.score(pictures, PROMPTS), found.values)


def test_what_does_not_fit_is_named(release: tuple[Path, Tensor], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder, _ = release
    state = load_file(folder / "model.safetensors")
    bad = {
        "mm_projector.2.bias": "missing: 2.bias",
        "vision_tower.vision_tower.vision_model.post_layernorm.bias": "post_layernorm.bias",
        "shared.weight": "is no CLIP-FlanT5", "lm_head.weight": "missing: lm_head.weight",
    }  # fmt: skip
    for number, (name, words) in enumerate(bad.items()):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "config.json").write_text((folder / "config.json").read_text())
        save_file({key: value for key, value in state.items() if key != name}, place / "model.safetensors")
        with pytest.raises(ModelError, match=words):
            rewards.load(NAME, place, "cpu", "fp32", tower=folder / "tower", tokenizer=folder)
    changed = {**state, "encoder.embed_tokens.weight": state["shared.weight"] + 1}
    save_file(changed, tmp_path / "0" / "model.safetensors")
    with pytest.raises(ModelError, match="one table in T5"):
        rewards.load(NAME, tmp_path / "0", "cpu", "fp32", tower=folder / "tower", tokenizer=folder)
