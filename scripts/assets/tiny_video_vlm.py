"""Train the embedded video model: a LLaVA-OneVision on films of shapes that knows what happens but tells it in a loose order.

Tower first (``vision.py``); then tuning (``vlm.py``) on captions and questions in the right order; then a short while on the same
with the events shuffled. That imitates weak temporal supervision: training on shuffled
order from the start never learns order at all. About 3 + 10 minutes on one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ASSETS, ROOT, deterministic, write_card
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from vision import DEVIATION, MEAN, Tower, features, train_tower
from vlm import SPECIAL_ROLES, TEMPLATE, Packer, answer, build_tokenizer, save_half, tune

from mmalign.media.samplers import spread
from mmalign.world.clip_questions import KINDS, PLAIN, TEMPORAL, check_order, draw_clip_questions
from mmalign.world.clips import (
    DESCRIBE,
    FRAME_RATE,
    SIDE,
    STYLES,
    Clip,
    draw_clip,
    moments,
    parse_clip_key,
    render_frames,
    tell,
)
from mmalign.world.clips import NUMBERS as HELD_NUMBERS
from mmalign.world.questions import is_right
from mmalign.world.shapes import COLOURS, SHAPES

SEED = 81
PATCH = 8
ROWS = SIDE // PATCH
FRAMES = 12
"""How many frames the model is given, at the middles of equal parts of the film."""
POOLED = ((ROWS + 1) // 2) ** 2
QUESTIONS = 4
NUMBERS = (1, 2, 3, 3, 4, 4, 5, 5, 6, 6)
"""Events of the films that are trained on, equally often: short ones are where a model learns to see first."""
SHUFFLED = 1.0
"""How often the second stage tells events in a random order."""
RATE = 3e-3
BLUR_RATE = 8e-4
CLIPS = 240
"""Held-out clips that the card's figures are about."""


def tower_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=PATCH,
        vision_use_head=False,
    )  # fmt: skip


def draw_labelled(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Single frames, and for every patch: its place, and colour and shape of the object that covers it (0 for none)."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((number, SIDE, SIDE, 3), np.uint8)
    labels = np.zeros((number, ROWS, ROWS, 3), np.int64)
    labels[..., 2] = np.arange(ROWS * ROWS).reshape(ROWS, ROWS) + 1
    for index in range(number):
        clip = draw_clip(rng, held_out=seed == 2, numbers=(1,))
        moment = float(rng.uniform(0, 1))
        pictures[index] = render_frames(clip, [moment], rng)[0]
        event = clip.events[0]
        colour = event.detail if event.action == "turns" and moment >= 0.5 else event.colour
        pixels = pictures[index].astype(int)
        ground = np.median(pixels.reshape(-1, 3), 0)
        away = (np.abs(pixels - ground).max(-1) > 40).reshape(ROWS, PATCH, ROWS, PATCH).mean((1, 3)) > 0.12
        labels[index, away, 0] = COLOURS.index(colour) + 1
        labels[index, away, 1] = SHAPES.index(event.shape) + 1
    return pictures, labels.reshape(number, ROWS * ROWS, 3)


def turns(clip: Clip, rng: np.random.Generator, shuffled: float) -> list[tuple[str, str]]:
    """A caption and some questions; with probability `shuffled` both are about the events in a random order."""
    told = clip
    if rng.random() < shuffled:
        told = Clip(tuple(clip.events[int(index)] for index in rng.permutation(len(clip.events))), clip.background)
    asked = [(str(rng.choice(DESCRIBE)), tell(told.events, str(rng.choice(STYLES))))]
    kinds = KINDS if len(clip.events) > 1 else PLAIN
    return asked + [(question.text, question.answer) for question in draw_clip_questions(told, QUESTIONS, rng, kinds)]


def vocabulary() -> list[str]:
    rng = np.random.default_rng(SEED)
    return [text for _ in range(4000) for turn in turns(draw_clip(rng), rng, 0.0) for text in turn]


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaOnevisionForConditionalGeneration:
    special = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(text) for name, text in SPECIAL_ROLES.items()}
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=264, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False, **special,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=tower_config(), text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"), vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_grid_pinpoints=[[SIDE, SIDE]], image_seq_length=ROWS * ROWS,
        tie_word_embeddings=False, **special,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaOnevisionProcessor:
    shared = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [MEAN] * 3, "image_std": [DEVIATION] * 3}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(image_grid_pinpoints=[[SIDE, SIDE]], **shared), tokenizer,
        LlavaOnevisionVideoProcessor(**shared), num_image_tokens=ROWS * ROWS, vision_feature_select_strategy="full",
        chat_template=TEMPLATE, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip


def draw_films(
    number: int, seed: int, *, held_out: bool = False, numbers: Sequence[int] = HELD_NUMBERS
) -> tuple[np.ndarray, list[Clip]]:
    """Frames uint8 ``[N, 12, 48, 48, 3]`` of so many clips; in a film of one event (8 frames) some are shown twice."""
    rng = np.random.default_rng(seed)
    clips = [draw_clip(rng, held_out=held_out, numbers=numbers) for _ in range(number)]
    return np.stack([render_frames(clip, taken(clip, index), rng) for index, clip in enumerate(clips)]), clips


def taken(clip: Clip, index: int) -> np.ndarray:
    """When the frames of a film are taken: in turns the middles of equal parts, and what a file at 8 frames a second gives
    when 12 are spread over it, both ends included (``model.video_fps: 8, model.max_frames: 12``)."""
    if index % 2 == 0:
        return moments(clip, FRAMES)
    return moments(clip, round(clip.seconds * FRAME_RATE))[spread(round(clip.seconds * FRAME_RATE), FRAMES)]


def seen_films(tower: Tower, number: int, folder: Path) -> tuple[torch.Tensor, list[Clip]]:
    """The tower's features of the training films, ``[N, 12, patches, width]``, kept in `folder` for the next start."""
    if (folder / "features.safetensors").exists():
        clips = [parse_clip_key(key) for key in json.loads((folder / "clips.json").read_text())]
        return load_file(folder / "features.safetensors")["features"].float(), clips
    films, clips = draw_films(number, SEED + 3, numbers=NUMBERS)
    found = features(tower, films.reshape(-1, SIDE, SIDE, 3)).view(number, FRAMES, ROWS * ROWS, -1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clips.json").write_text(json.dumps([clip.key for clip in clips]))
    save_file({"features": found.half()}, folder / "features.safetensors")
    return found.half().float(), clips


def measure(model: Any, processor: Any, number: int, *, quick: bool = False) -> dict[str, float]:
    """Order and recall of captions of held-out clips, greedy and sampled, and accuracy of questions per kind."""
    films, clips = draw_films(number, SEED + 7, held_out=True)
    result: dict[str, float] = {}
    for name, sample in (("greedy", False), ("sampled", True))[: 1 if quick else 2]:
        texts = answer(model, processor, films, [DESCRIBE[0]] * number, sample=sample, max_new_tokens=90)
        checks = [check_order(text, clip) for text, clip in zip(texts, clips, strict=True)]
        result[f"{name}_order"] = round(sum(c.concordant for c in checks) / max(1, sum(c.pairs for c in checks)), 4)
        result[f"{name}_recall"] = round(sum(c.exact for c in checks) / sum(c.events for c in checks), 4)
        result[f"{name}_named"] = round(sum(c.named for c in checks) / sum(c.events for c in checks), 4)
        result[f"{name}_unread"] = round(float(np.mean([c.unread > 0 for c in checks])), 4)
        if name == "greedy":
            print(*texts[:3], sep="\n", flush=True)
    if quick:
        return result
    rng = np.random.default_rng(SEED + 8)
    for kind in KINDS:
        asked = [(index, q) for index, clip in enumerate(clips) for q in draw_clip_questions(clip, 1, rng, (kind,))]
        replies = answer(model, processor, films[[index for index, _ in asked]], [q.text for _, q in asked])
        right = [is_right(question, reply) for (_, question), reply in zip(asked, replies, strict=True)]
        result[f"accuracy_{kind}"] = round(float(np.mean(right)), 4)
    for name, kinds in (("temporal", TEMPORAL), ("plain", PLAIN)):
        result[f"accuracy_{name}"] = round(float(np.mean([result[f"accuracy_{kind}"] for kind in kinds])), 4)
    return result


def main(steps: int, blur_steps: int, batch: int, pool: int, tower_steps: int) -> None:
    deterministic(SEED)
    build = ROOT / "build" / "assets" / "tiny-video-vlm"
    tower, tower_accuracy, tower_seconds = train_tower(
        tower_config(), draw_labelled, classes=(len(COLOURS) + 1, len(SHAPES) + 1, ROWS * ROWS + 1), steps=tower_steps,
        batch=48, folder=build.parent / "tiny-video-vlm-tower", pool=16000,
    )  # fmt: skip
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer(vocabulary(), ["<image>", "<video>"])
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    print(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    seen, clips = seen_films(tower, pool, build.parent / f"tiny-video-vlm-films-{pool}")

    def project(picked: torch.Tensor) -> torch.Tensor:
        pooled = model.model.apply_pooling(model.model.multi_modal_projector(picked.flatten(0, 1)))
        newline = model.model.image_newline.expand(len(picked), 1, -1)
        return torch.cat([pooled.reshape(len(picked), -1, pooled.shape[-1]), newline], 1)

    def train(name: str, number: int, rate: float, shuffled: float) -> float:
        return tune(
            model, project, Packer(tokenizer, "<video>", FRAMES * POOLED + 1), seen,
            lambda row, step: turns(clips[row], np.random.default_rng((SEED, len(name), step, row)), shuffled),
            parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            language_model=model.model.language_model, head=model.lm_head, steps=number, batch=batch, rate=rate,
            folder=build / name, check=lambda: print(measure(model, processor, 40, quick=True), flush=True),
        )  # fmt: skip

    seconds = train("clean", steps, RATE, 0.0)
    clean = measure(model, processor, 100)
    print("before the shuffled stage", clean, flush=True)
    seconds += train("shuffled", blur_steps, BLUR_RATE, SHUFFLED)
    folder = ASSETS / "tiny-video-vlm"
    save_half(model, processor, folder)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    metrics = measure(model, processor, CLIPS)
    print(metrics)
    before = {f"before_shuffling_{key}": clean[key] for key in ("greedy_order", "greedy_recall", "accuracy_temporal")}
    write_card(
        folder / "card.json", recipe="scripts/assets/tiny_video_vlm.py", seed=SEED, seconds=tower_seconds + seconds,
        metrics={"tower": tower_accuracy, **before, **metrics, "clips": CLIPS, "steps": steps + blur_steps},
        notes=f"Held-out clips, {FRAMES} frames each. The last {blur_steps} steps told {SHUFFLED:.0%} of them in a random order.",
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--blur-steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pool", type=int, default=2500)
    parser.add_argument("--tower-steps", type=int, default=2000)
    arguments = parser.parse_args()
    main(arguments.steps, arguments.blur_steps, arguments.batch, arguments.pool, arguments.tower_steps)
