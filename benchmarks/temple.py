"""Speed of TEMPLE's step on pairs of answers about a film, against two independent plain sequences, in one run on one machine.

    python benchmarks/temple.py                          # a LLaVA-OneVision of small widths: 1,025 visual tokens, answers of 64
    python benchmarks/temple.py --frames 16 64 --answer 64 --seconds 4 --repeats 5 --json out.json

The plain side is plain transformers: chosen and rejected answer are two rows, each with the whole film, tower included, in
the policy's pass and in the reference's. Ours reads the film's stored features and puts both answers behind one prompt. Both
sides train the same adapters with a reference of the adapters as they were at the stage's start, and must agree on loss and
gradient before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dpo_measure import interleaved
from flops import matmul_rate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vlm_models import TEMPLATE, _save, _tokenizer, words

from mmalign.branches import Answer as Said
from mmalign.branches import BranchBatch, BranchRecord, Message, Part, VideoRef
from mmalign.errors import MmalignError
from mmalign.models.adapters import attach_lora
from mmalign.models.reference import FrozenAdapterReference
from mmalign.models.stored_answers import VisionStore
from mmalign.models.vlm import VLM_FAMILIES
from mmalign.models.vlm.base import VlmConfig
from mmalign.trainers.base import Parts
from mmalign.trainers.temple import StageConfig, Temple, TempleConfig
from mmalign.types import ImageRef, StepContext

SIDE, PATCH = 112, 14
TOKENS = 16
"""Visual tokens a frame: 8 x 8 patches, pooled 2 x 2."""
RANK = 16
BETA = 0.1
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


def build(folder: Path) -> Path:
    """LLaVA-OneVision's parts at small widths, 32,000 words."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = _tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    size, points = {"height": SIDE, "width": SIDE}, [[SIDE, SIDE]]
    template = (TEMPLATE % "<image>\n").replace(
        "{% else %}", "{% elif part['type'] == 'video' %}<video>\n{% else %}", 1
    )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=points), tokenizer,
        LlavaOnevisionVideoProcessor(size=size), num_image_tokens=64, vision_feature_select_strategy="full",
        chat_template=template, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH, "vision_use_head": False,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 32_000, "max_position_embeddings": 8192, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"), image_grid_pinpoints=points, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return _save(folder, LlavaOnevisionForConditionalGeneration(config), processor)


def pairs(number: int, frames: int, answer: int) -> list[BranchRecord]:
    """Pairs of answers of about `answer` tokens about films of random pictures."""
    import io

    from PIL import Image

    rng, vocabulary = np.random.default_rng(0), words(800)

    def picture() -> ImageRef:
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(out, "PNG")
        return ImageRef(data=out.getvalue(), label="frame")

    def said() -> Said:
        return Said(text=" ".join(rng.choice(vocabulary, answer - 2)))

    parts = (Part(media=0), Part(text="Tell what happens in the video, in order."))
    return [
        BranchRecord(
            id=f"p{index}", messages=(Message(role="user", parts=parts),), answers=(said(), said()),
            media=(VideoRef(frames=tuple(picture() for _ in range(frames)), fps=1.0),),
        )
        for index in range(number)
    ]  # fmt: skip


class Side:
    """Steps over the same pairs in turn."""

    pairs_per_step = 1

    def __init__(self) -> None:
        self.cpu: list[float] = []

    def step(self, *, optimise: bool = True) -> float:
        raise AssertionError("a side defines its step")

    def run(self, seconds: float) -> float:
        """Pairs per second of wall time over at least `seconds`, one step at least."""
        steps, begin = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - begin < seconds:
            used = time.process_time()
            self.step()
            self.cpu.append(time.process_time() - used)
            steps += 1
        return steps * self.pairs_per_step / (time.perf_counter() - begin)


class Ours(Side):
    """`Temple` in a stage of pairs.

    Args:
        cached: the film's features are read from a store on disk; else the tower runs once a step.
    """

    def __init__(self, family: Any, records: Sequence[BranchRecord], *, cached: Path | None) -> None:
        super().__init__()
        self.family = copy.copy(family)
        self.policy = tuned(family)
        self.family.network = self.policy
        reference = FrozenAdapterReference(self.policy)
        store = None if cached is None else VisionStore(cached)
        stages = (StageConfig(name="r2", steps=10**6),)
        parts = Parts(family=self.family, policy=self.policy, reference=reference, steps=10**6, features=store)
        self.trainer = Temple.build(TempleConfig(beta=BETA, stages=stages), parts)
        made = [self.family.collate([self.family.encode(record)]) for record in records]
        if store is not None:
            for batch in made:
                store.put(batch, self.family.vision_features(self.policy, batch))
        move(self.policy)
        self.batches = itertools.cycle(made)
        self.optimizer = torch.optim.AdamW(trained(self.policy), lr=1e-4, weight_decay=0.0)

    def step(self, *, optimise: bool = True) -> float:
        out = self.trainer.training_step(next(self.batches), StepContext(step=0, seed=0, device=torch.device("cpu")))
        out.loss.backward()
        if optimise:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(out.loss.detach())


class Plain(Side):
    """Two rows a pair in plain transformers: the film's pixels in both, in the policy's and in the reference's pass."""

    def __init__(self, family: Any, records: Sequence[BranchRecord]) -> None:
        super().__init__()
        self.policy = tuned(family)
        self.reference = FrozenAdapterReference(self.policy)
        self.rows = itertools.cycle([self._row(family, record) for record in records])
        move(self.policy)
        self.optimizer = torch.optim.AdamW(trained(self.policy), lr=1e-4, weight_decay=0.0)

    def _row(self, family: Any, record: BranchRecord) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        (encoded,) = family.encode(record).rows
        longest = max(map(len, encoded.branches))
        ids = torch.zeros((2, len(encoded.prefix) + longest), dtype=torch.int64)
        mask, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for side, branch in enumerate(encoded.branches):
            whole = torch.cat([encoded.prefix, branch])
            ids[side, : len(whole)], mask[side, : len(whole)] = whole, 1
            answer[side, len(encoded.prefix) : len(whole)] = True
        pixels = torch.stack([encoded.units[0].tensors["pixel_values_videos"]] * 2)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels}, ids, answer

    def _sums(self, model: Any, row: tuple[dict[str, Tensor], Tensor, Tensor]) -> Tensor:
        inputs, ids, answer = row
        logits = model(**inputs).logits[:, :-1].float()
        found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (found * answer[:, 1:]).sum(1)

    def step(self, *, optimise: bool = True) -> float:
        row = next(self.rows)
        asked = self.reference(lambda model: self._sums(model, row))
        gap = self._sums(self.policy, row) - asked
        loss = -torch.nn.functional.logsigmoid(BETA * (gap[0] - gap[1]))
        loss.backward()
        if optimise:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach())


def tuned(family: Any) -> Any:
    """A copy of the network with fresh adapters on the language model."""
    network = copy.deepcopy(family.network)
    return attach_lora(network, rank=RANK, alpha=2 * RANK, targets=family.lora_targets["language"], seed=1).train()


def trained(policy: Any) -> list[Tensor]:
    return [value for value in policy.parameters() if value.requires_grad]


def move(policy: Any) -> None:
    """Shift the adapters a little: at the start every loss is log 2, whatever one computes."""
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in policy.named_parameters():
            if "lora_B" in name:
                value.copy_(0.02 * torch.randn(value.shape, generator=stream))


def agree(sides: dict[str, Side]) -> dict[str, float]:
    """Loss and gradients of all sides on the first pair.

    Raises:
        MmalignError: they differ by more than rounding.
    """
    losses, gradients = {}, {}
    for name, side in sides.items():
        losses[name] = side.step(optimise=False)
        policy = side.policy  # type: ignore[attr-defined]
        gradients[name] = torch.cat([value.grad.flatten() for value in trained(policy)])
        policy.zero_grad()
    first, *others = losses
    apart = max(abs(losses[name] - losses[first]) for name in others)
    turned = max(float((gradients[name] - gradients[first]).norm() / gradients[first].norm()) for name in others)
    if apart > LOSS_TOLERANCE or turned > GRADIENT_TOLERANCE:
        raise MmalignError(f"the sides disagree: losses {losses}, gradients apart by {turned:.2e}; nothing was timed")
    return {"loss_difference": apart, "gradient_difference": turned}


def count(side: Side) -> int:
    """FLOPs that one step really runs: two per multiply-add."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        side.step()
    side.cpu.clear()
    return int(counter.get_total_flops())


def compare(folder: Path, frames: int, answer: int, seconds: float, repeats: int) -> dict[str, Any]:
    """All sides at one length of film."""
    family: Any = VLM_FAMILIES.get("vlm").load(VlmConfig(path=str(folder / "model")), device=torch.device("cpu"))  # type: ignore[attr-defined]
    records = pairs(2, frames, answer)
    sides: dict[str, Side] = {
        "two plain sequences": Plain(family, records), "ours, tower in the step": Ours(family, records, cached=None),
        "ours": Ours(family, records, cached=folder / f"features-{frames}"),
    }  # fmt: skip
    agreed = agree(sides)
    batch: BranchBatch = family.collate([family.encode(records[0])])
    flops = {name: count(side) for name, side in sides.items()}
    speeds, ratios, _ = interleaved(
        sides, lambda: matmul_rate(512, torch.float32, torch.device("cpu")), ours=list(sides)[1:], seconds=seconds,
        repeats=repeats, tick=lambda text: None,
    )  # fmt: skip
    plain = "two plain sequences"
    rows = {
        name: {
            "pairs_per_second": speeds[name].median, "cpu_seconds": statistics.median(side.cpu), "gflops": flops[name] / 1e9,
            "ratio": None if name == plain else {k: getattr(ratios[name][plain], k) for k in ("median", "low", "high")},
            "cpu_ratio": statistics.median(sides[plain].cpu) / statistics.median(side.cpu), "bound": flops[plain] / flops[name],
        }
        for name, side in sides.items()
    }  # fmt: skip
    return {"frames": frames, "prefix": batch.prefix_lengths[0], "answers": list(batch.branch_lengths[0]), "agreement": agreed,
            "sides": rows}  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """One length of film as text."""
    agreed = found["agreement"]
    lines = [
        f"{found['frames']} frames: prompt of {found['prefix']} tokens, answers of {found['answers']}; losses apart by "
        f"{agreed['loss_difference']:.1e}, gradients by {agreed['gradient_difference']:.1e} of their size",
        f"{'side':<26}{'pairs/s':>9}{'CPU s':>8}{'GFLOP':>8}{'x plain':>9}{'low-high':>14}{'by CPU s':>10}{'by FLOPs':>10}",
    ]
    for name, row in found["sides"].items():
        ratio = row["ratio"]
        shown = ("", "") if ratio is None else (f"{ratio['median']:.2f}", f"{ratio['low']:.2f}-{ratio['high']:.2f}")
        lines.append(
            f"{name:<26}{row['pairs_per_second']:>9.3f}{row['cpu_seconds']:>8.2f}{row['gflops']:>8.1f}{shown[0]:>9}{shown[1]:>14}"
            f"{row['cpu_ratio']:>10.2f}{row['bound']:>10.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[64], help="frames of a film; 16 visual tokens each")
    parser.add_argument("--answer", type=int, default=64, help="words of an answer; about a token each")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    found = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    results = []
    with tempfile.TemporaryDirectory(prefix="mmalign-temple-bench-") as scratch:
        build(Path(scratch) / "model")
        for frames in found.frames:
            results.append(compare(Path(scratch), frames, found.answer, found.seconds, found.repeats))
            print(report(results[-1]), flush=True)
    if found.json:
        found.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
