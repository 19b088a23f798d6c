"""The other side of the scoring benchmark: one picture at a time, as the packages' own examples score.

Each reward is a call of its own that opens the file, runs transformers' processor on one picture and its prompt, and runs
image and text through the network, as the examples of PickScore, HPSv2, CLIPScore and the aesthetic predictor do. No code
of theirs is used. The network is loaded once; the released hpsv2 package reads its checkpoint at every call, which is
timed apart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from rewards_inputs import ReleasedHead
from torch import Tensor


class Snippets:
    """The examples around one loaded network.

    Args:
        folder: a transformers CLIP folder with aesthetic heads.
        processor: ``pil`` computes the pixels ours computes; ``auto`` is what the library picks, which with torchvision is
            faster and differs by up to two grey levels.
    """

    def __init__(self, folder: Path, *, device: str, dtype: torch.dtype, processor: str) -> None:
        from transformers import AutoImageProcessor, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.device, self.dtype = device, dtype
        self.model = CLIPModel.from_pretrained(folder, dtype=dtype).to(device).eval()
        kind = CLIPImageProcessorPil if processor == "pil" else AutoImageProcessor
        self.processor, self.tokenizer = kind.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
        width = self.model.config.projection_dim
        self.v2, self.v1 = ReleasedHead(width), torch.nn.Linear(width, 1)
        self.v2.load_state_dict(torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True))
        self.v1.load_state_dict(torch.load(folder / "sa_0_4_vit_l_14_linear.pth", weights_only=True))
        for head in (self.v2, self.v1):
            head.to(device).eval()

    def _image(self, file: Path) -> Tensor:
        pixels = self.processor(images=Image.open(file), return_tensors="pt").pixel_values.to(self.device, self.dtype)
        vector = self.model.get_image_features(pixel_values=pixels).pooler_output.float()
        return vector / vector.norm(dim=-1, keepdim=True)

    def _text(self, prompt: str) -> Tensor:
        tokens = self.tokenizer(prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
        vector = self.model.get_text_features(**tokens.to(self.device)).pooler_output.float()
        return vector / vector.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def clipscore(self, file: Path, prompt: str) -> float:
        """100 max(0, cos)."""
        return 100 * max(0.0, float((self._image(file) * self._text(prompt)).sum()))

    @torch.no_grad()
    def aesthetic_v1(self, file: Path, prompt: str) -> float:
        """The linear predictor; the prompt is not read."""
        return float(self.v1(self._image(file)))

    @torch.no_grad()
    def aesthetic_v2(self, file: Path, prompt: str) -> float:
        """The stack of linear layers; the prompt is not read."""
        return float(self.v2.layers(self._image(file)))

    def of(self, reward: str) -> Callable[[Path, str], float]:
        """The call for one reward."""
        return {
            "clipscore": self.clipscore,
            "aesthetic-v1-l14": self.aesthetic_v1,
            "aesthetic": self.aesthetic_v2,
        }[reward]
