"""Pictures resized on the GPU: which of a batch are, and that all give the scores of the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmalign import rewards
from mmalign.rewards.decoders import ProcessDecoders
from mmalign.rewards.inputs import SCORED
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.reading import Reader
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


def test_letterboxes_do_not_depend_on_what_was_scored_before(tmp_path: Path) -> None:
    """Alone, after others, on threads and by processes: the same pixels to the last bit."""
    rules = {rule.key: rule for rule in (Preprocess("hps_letterbox", 224), Preprocess("clip_hf", 224))}
    generator, files = np.random.default_rng(1), []
    for index in range(4 * BEFORE):
        pixels = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(files[-1])

    def read(paths: list[Path], decoders: ProcessDecoders | None) -> list[dict[str, torch.Tensor]]:
        stage = DeviceResize(torch.device("cuda"))
        reader = Reader(rules, keep_image=False, limits=SCORED, stage=stage, decoders=decoders)
        with ThreadPoolExecutor(2) as pool:
            window = reader.read(paths, 0, pool)
        return [{key: value.cpu() for key, value in window.pictures[digest].pixels.items()} for digest in window.digests]

    decoders = ProcessDecoders(1)
    try:
        together, there = read(files, None), read(files, decoders)
    finally:
        decoders.close()
    alone = [read([file], None)[0] for file in (files[0], files[-1])]
    for ways in ((together, there), ([together[0], together[-1]], alone)):
        for one, other in zip(*ways, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in rules)
