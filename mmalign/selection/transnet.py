"""TransNetV2: a small network that says of every frame whether a shot changes there (arXiv:2008.04838).

Three stages of dilated convolutions over time look at frames of 48 x 27 pixels; beside them stand how alike each frame is to
the 50 before and the 50 behind it, once by learned features and once by colour histograms (section 3.1 of the paper). Two
outputs: one frame per transition, and every frame that belongs to one. Names of parameters are those of the authors' PyTorch
weights, which `mmalign rewards convert` turns into safetensors. Not there: what is used in training alone (the stochastic depth
of two stages), and options that the published weights do not use.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmalign.errors import ModelError
from mmalign.rewards.files import load_strictly, read_state

WIDTH, HEIGHT = 48, 27
"""Pixels of a frame; its shape is given up for them, as in training."""
LOOK = 101
"""Frames that a frame is compared with: itself, 50 before, 50 behind."""
WINDOW, STRIDE, EDGE = 100, 50, 25
"""Frames looked at together, how far the next look is on, and frames at both ends of a look whose answers are not used."""


class TransNetV2(nn.Module):
    """The published network; in inference mode until told otherwise.

    Args:
        width: filters of the first stage; 16 in the published weights.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        stages = [_Stage(3, width), _Stage(4 * width, 2 * width), _Stage(8 * width, 4 * width)]
        self.SDDCNN = nn.ModuleList(stages)
        self.frame_sim_layer = _LearnedLikeness(4 * (1 + 2 + 4) * width)
        self.color_hist_layer = _ColourLikeness()
        self.dropout = nn.Dropout(0.5)
        self.fc1 = nn.Linear(16 * width * (WIDTH // 8) * (HEIGHT // 8) + 2 * 128, 1024)
        self.cls_layer1 = nn.Linear(1024, 1)
        self.cls_layer2 = nn.Linear(1024, 1)
        self.eval()

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of two questions about every frame, ``[B, T]`` each: is it the one that marks a transition; is it part of one.

        Args:
            frames: uint8 ``[B, T, 27, 48, 3]``, red first.
        """
        if frames.dtype != torch.uint8 or tuple(frames.shape[2:]) != (HEIGHT, WIDTH, 3) or frames.ndim != 5:
            raise ValueError(f"frames must be uint8 [B, T, {HEIGHT}, {WIDTH}, 3], got {frames.dtype} {tuple(frames.shape)}")
        seen = frames.permute(0, 4, 1, 2, 3).to(self.fc1.weight.dtype) / 255
        levels = []
        for stage in self.SDDCNN:
            seen = stage(seen)
            levels.append(seen)
        read = seen.permute(0, 2, 3, 4, 1).flatten(2)
        found = torch.cat([self.color_hist_layer(frames), self.frame_sim_layer(levels), read], dim=2)
        found = self.dropout(functional.relu(self.fc1(found)))
        return self.cls_layer1(found)[..., 0], self.cls_layer2(found)[..., 0]


class _Stage(nn.Module):
    """Two blocks with a way round the second, then half the pixels. [B, C, T, H, W] -> [B, 4 filters, T, H / 2, W / 2]"""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList([_Block(channels, filters), _Block(4 * filters, filters)])

    def forward(self, seen: Tensor) -> Tensor:
        first = functional.relu(self.DDCNN[0](seen))
        return functional.avg_pool3d(functional.relu(self.DDCNN[1](first)) + first, (1, 2, 2))


class _Block(nn.Module):
    """Four convolutions that look 1, 2, 4 and 8 frames away, side by side, normalised together."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.Conv3D_1 = _Separated(channels, filters, 1)
        self.Conv3D_2 = _Separated(channels, filters, 2)
        self.Conv3D_4 = _Separated(channels, filters, 4)
        self.Conv3D_8 = _Separated(channels, filters, 8)
        self.bn = nn.BatchNorm3d(4 * filters, eps=1e-3)

    def forward(self, seen: Tensor) -> Tensor:
        ways = (self.Conv3D_1, self.Conv3D_2, self.Conv3D_4, self.Conv3D_8)
        found: Tensor = self.bn(torch.cat([way(seen) for way in ways], dim=1))
        return found


class _Separated(nn.Module):
    """A convolution over the picture, then one over time that skips `step` frames."""

    def __init__(self, channels: int, filters: int, step: int) -> None:
        super().__init__()
        space = nn.Conv3d(channels, 2 * filters, (1, 3, 3), padding=(0, 1, 1), bias=False)
        time = nn.Conv3d(2 * filters, filters, (3, 1, 1), dilation=(step, 1, 1), padding=(step, 0, 0), bias=False)
        self.layers = nn.ModuleList([space, time])

    def forward(self, seen: Tensor) -> Tensor:
        found: Tensor = self.layers[1](self.layers[0](seen))
        return found


class _LearnedLikeness(nn.Module):
    """How alike the frames around are by features of all stages, averaged over the picture. -> [B, T, 128]"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(channels, 128)
        self.fc = nn.Linear(LOOK, 128)

    def forward(self, levels: list[Tensor]) -> Tensor:
        features = torch.cat([level.mean(dim=(3, 4)) for level in levels], dim=1).transpose(1, 2)
        return functional.relu(self.fc(around(functional.normalize(self.projection(features), dim=2))))


class _ColourLikeness(nn.Module):
    """How alike the frames around are by histograms of 8 x 8 x 8 colours. -> [B, T, 128]"""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(LOOK, 128)

    def forward(self, frames: Tensor) -> Tensor:
        histograms = functional.normalize(colour_histograms(frames).to(self.fc.weight.dtype), dim=2)
        return functional.relu(self.fc(around(histograms)))


def around(vectors: Tensor) -> Tensor:
    """Products of every vector with those 50 before to 50 behind it, zero beyond the ends. [B, T, D] -> [B, T, 101]"""
    reach = LOOK // 2
    padded = functional.pad(vectors, (0, 0, reach, reach))
    return torch.einsum("btd,btdk->btk", vectors, padded.unfold(1, LOOK, 1))


def colour_histograms(frames: Tensor) -> Tensor:
    """How many pixels have each of 512 colours, by the upper three bits of each channel. uint8 [B, T, H, W, 3] -> [B, T, 512]"""
    red, green, blue = (frames.long() >> 5).flatten(2, 3).unbind(-1)
    places = (red << 6) + (green << 3) + blue
    counts = torch.zeros(*places.shape[:2], 512, dtype=torch.int64, device=frames.device)
    return counts.scatter_add_(2, places, torch.ones_like(places))


class TransitionFinder:
    """Frames one at a time, in windows of 100 every 50, of which the middle 50 are answered; the ends repeat their frame.

    The network sees what it saw in training however long a film is, and no more than a window is held.

    Args:
        ask: uint8 ``[100, 27, 48, 3]`` -> one number per frame ``[100]``.
    """

    def __init__(self, ask: Callable[[Tensor], Tensor]) -> None:
        self.ask = ask
        self._held: list[Tensor] = []
        self._answers: list[Tensor] = []
        self._count = 0

    def see(self, frame: np.ndarray) -> None:
        """The next frame, any size: uint8 ``[H, W, 3]``, red first."""
        small = torch.from_numpy(small_frame(frame))
        if not self._count:
            self._held = [small] * EDGE
        self._hold(small)
        self._count += 1

    def finish(self) -> np.ndarray:
        """The answers of all frames seen. float32 ``[N]``"""
        if self._count:
            last = self._held[-1]
            for _ in range(EDGE + -self._count % STRIDE):
                self._hold(last)
        found = torch.cat(self._answers)[: self._count] if self._answers else torch.zeros(0)
        return found.float().cpu().numpy()

    def _hold(self, frame: Tensor) -> None:
        self._held.append(frame)
        if len(self._held) == WINDOW:
            self._answers.append(self.ask(torch.stack(self._held))[EDGE : WINDOW - EDGE])
            del self._held[:STRIDE]


def small_frame(frame: np.ndarray) -> np.ndarray:
    """A frame as the network sees it: uint8 ``[27, 48, 3]`` (bicubic, antialiased, shape not kept)."""
    if frame.shape[:2] == (HEIGHT, WIDTH):
        return np.ascontiguousarray(frame)
    from PIL import Image

    return np.array(Image.fromarray(frame).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def load_transnet(path: str | Path) -> TransNetV2:
    """The network with weights from a safetensors file; every name and shape must fit.

    Raises:
        ModelError: no such file, not safetensors, damaged, or other weights.
    """
    source = Path(path)
    if source.suffix != ".safetensors" and source.is_file():
        raise ModelError(
            f"{source} is no safetensors file; 'mmalign rewards convert {source} transnetv2.safetensors' extracts its tensors"
        )
    network = TransNetV2()
    load_strictly(network, read_state(source), source)
    return network
