"""A base that goes on speaking where it sees nothing: the embedded model tuned a little further with part of the picture hidden.

A large model writes fluent sentences about a picture that it cannot see, from what it knows of language; that is what the method
lives on. The embedded model has never been without a picture and falls apart: at the paper's rate nine in ten of its answers
hold a sentence that is none. Here it goes on learning what it was made from, descriptions by the writer with the bad habit and
questions, while a random share of the image tokens is hidden from half of the rows. The habit stays; what it says half blind
is whole sentences.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmalign import assets, demo_vlm, rng
from mmalign.branches import Answer, BranchRecord, Message, Part
from mmalign.models.hallucinate.masks import hidden_tokens
from mmalign.models.vlm import VLM_FAMILIES
from mmalign.types import ImageRef
from mmalign.world.captions import DESCRIBE, STYLES, describe, habit
from mmalign.world.questions import KINDS, ask
from mmalign.world.scenes import draw_scene, render_board

STEPS, BATCH, RATE, SEED = 400, 16, 3e-4, 51
QUESTIONED = 4
"""Every so many-th row is a question with its right answer."""


def load(path: str | Path) -> Any:
    """A family on the CPU."""
    family = VLM_FAMILIES.get("vlm")
    return family.load(family.Config(name="vlm", path=str(path)), device=torch.device("cpu"))  # type: ignore[attr-defined]


def draw_record(name: str, draw: np.random.Generator, *, question: bool) -> BranchRecord:
    """A board of the training part with a description by the careless writer, or with a question."""
    while True:
        scene = draw_scene(draw)
        asked = ask(scene, str(draw.choice(KINDS)), draw) if question else None
        if asked is not None or not question:
            break
    if asked is None:
        style = str(draw.choice(STYLES))
        text, answer = str(draw.choice(DESCRIBE)), describe(habit(scene, draw), scene.background, style)
    else:
        text, answer = asked.text, asked.answer
    buffer = io.BytesIO()
    Image.fromarray(render_board(scene, draw)).save(buffer, "PNG")
    return BranchRecord(
        id=name, messages=(Message(role="user", parts=(Part(media=0), Part(text=text))),),
        answers=(Answer(text=answer),), media=(ImageRef(data=buffer.getvalue(), label=name),),
    )  # fmt: skip


def make(folder: Path, *, steps: int = STEPS) -> Path:
    """Tune and save, unless it is there."""
    if (folder / "config.json").exists():
        return folder
    family = load(assets.path(demo_vlm.MODEL))
    network = family.freeze_vision(family.network.float().requires_grad_(True), projector=True).train()
    weights = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.01)
    for step in range(steps):
        draw = rng.numpy_stream(SEED, "fluent", step)
        records = [draw_record(f"{step}-{row}", draw, question=row % QUESTIONED == 0) for row in range(BATCH)]
        examples = [family.encode(record) for record in records]
        batch = family.collate(examples)
        hide = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        for row, example in enumerate(examples):
            prefix = example.rows[0].prefix
            share = float(draw.uniform(0.3, 1.0)) if row % 2 and row % QUESTIONED else 0.0
            hide[row, : len(prefix)] = hidden_tokens(family, prefix, share, draw)
        found = family.log_probs(network, batch, hide=hide)
        loss = -found.sum.sum() / found.length.sum()
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            print(f"fluent base, step {step + 1}: {loss.item():.3f} nats a token", flush=True)
    family.save_full(network.eval(), folder)
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(make(Path("runs/bdhs/base")))
