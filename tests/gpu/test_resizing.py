"""Pictures resized on the GPU: some of a batch, others by the processor, and both give the scores of the CPU."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from mmalign import rewards
from mmalign.rewards.scorer import ScorerSet
from mmalign.rewards.staging import BEFORE, DeviceResize


def test_a_batch_of_pictures_from_both_ways_scores_as_on_the_cpu() -> None:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (96, 128, 3), dtype=np.uint8)) for _ in range(3 * BEFORE)]
    expected = rewards.load("tiny-clip", device="cpu", dtype="fp32").score(pictures, "a red circle")
    scorer = rewards.load("tiny-clip", device="cuda", dtype="fp32")
    both = ScorerSet([scorer.backend])
    both.engine.reader.stage = DeviceResize(torch.device("cuda"))
    torch.testing.assert_close(both.score(pictures, "a red circle")["tiny-clip"], expected, rtol=1e-4, atol=1e-3)
