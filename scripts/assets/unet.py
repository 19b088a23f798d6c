"""Train the embedded generator on latents of the embedded VAE (about 40 minutes on one thread).

v-prediction on 8x8 latents, because epsilon-prediction left a constant error per latent channel at this size. The text
encoder starts from the text tower of the contrastive CLIP and learns at 0.3 of the rate. One caption in five is
corrupted, so that the base follows its captions imperfectly and leaves something to align.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
import torch.nn.functional as F
from clip import STARTS
from common import ASSETS, Progress, deterministic, draw_renders, forget_paths, rate_factor, to_signed, write_card
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from mmalign.world.oracle import is_exact, oracle_checks
from mmalign.world.shapes import corrupt, sample_scene

SEED = 41
FOLDER = ASSETS / "tiny-sd"


def build(width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, block_out_channels=(64, 96), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1,
        clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction",
    )  # fmt: skip


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [vae.encode(part).latent_dist for part in pixels.split(200)]
    factor = vae.config.scaling_factor
    return torch.cat([part.mean for part in parts]) * factor, torch.cat([part.std for part in parts]) * factor


@torch.no_grad()
def evaluate(pipeline: StableDiffusionPipeline, number: int, guidance: float) -> dict[str, float]:
    """Oracle checks over held-out prompts, 15 DDIM steps."""
    rng = np.random.default_rng(7)
    captions = [sample_scene(rng, held_out=True).caption for _ in range(number)]
    pictures = []
    for start in range(0, number, 64):
        generator = [torch.Generator().manual_seed(index) for index in range(start, min(number, start + 64))]
        out = pipeline(captions[start : start + 64], num_inference_steps=15, guidance_scale=guidance, generator=generator,
                       output_type="np")  # fmt: skip
        pictures.append(out.images)
    found = oracle_checks((np.concatenate(pictures) * 255 + 0.5).astype(np.uint8), captions)
    names = ("background", "count", "colour", "shape", "size", "relation")
    result = {name: float(np.mean([row[name] for row in found if name in row])) for name in names}
    result["mean"] = float(np.mean([np.mean(list(row.values())) for row in found]))
    result["exact"] = float(np.mean([is_exact(row) for row in found]))
    return {name: round(value, 3) for name, value in result.items()}


def main(steps: int, batch: int, report_every: int) -> None:
    deterministic(SEED)
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    start = CLIPModel.from_pretrained(STARTS / "tiny-clip")
    text_encoder = CLIPTextModel(start.config.text_config)
    text_encoder.load_state_dict(start.text_model.state_dict())
    unet = build(start.config.text_config.hidden_size)
    noising = scheduler()
    pictures, scenes, _ = draw_renders(24000, SEED)
    mean, std = encode(vae, to_signed(pictures))
    rng = np.random.default_rng(SEED + 1)
    captions = [(corrupt(scene, rng) if rng.random() < 0.2 else scene).caption for scene in scenes]
    captions = ["" if rng.random() < 0.1 else caption for caption in captions]
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    groups = [{"params": unet.parameters(), "lr": 1.5e-3}, {"params": text_encoder.parameters(), "lr": 4.5e-4}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, steps=steps, warmup=100, flat=0.4)
    )
    averages = [copy.deepcopy(unet).requires_grad_(False), copy.deepcopy(text_encoder).requires_grad_(False)]
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=averages[1], tokenizer=tokenizer, unet=averages[0], scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    chooser = torch.Generator().manual_seed(SEED)
    progress = Progress(steps)
    for step in range(steps):
        rows = torch.randint(len(mean), (batch,), generator=chooser)
        clean = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=chooser)
        noise = torch.randn(clean.shape, generator=chooser)
        times = torch.randint(1000, (batch,), generator=chooser)
        noisy = noising.add_noise(clean, noise, times)
        context = text_encoder(tokens[rows]).last_hidden_state
        loss = F.mse_loss(unet(noisy, times, context).sample, noising.get_velocity(clean, noise, times))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*unet.parameters(), *text_encoder.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, live in zip(averages, (unet, text_encoder), strict=True):
                for old, new in zip(average.parameters(), live.parameters(), strict=True):
                    old.lerp_(new, 1 - decay)
        progress(step, loss)
        if report_every and (step + 1) % report_every == 0 and step + 1 < steps:
            print(f"  guidance 2: {evaluate(pipeline, 128, 2.0)}", flush=True)

    metrics = {f"guidance_{guidance:g}": evaluate(pipeline, 256, guidance) for guidance in (1.0, 2.0, 4.0)}
    print(metrics)
    for module in (*averages, vae):
        module.half()
    averages[1].float()  # transformers keeps the dtype of the file, and a plain pipeline must come out float32
    pipeline.save_pretrained(FOLDER, safe_serialization=True)
    forget_paths(FOLDER)
    write_card(
        FOLDER / "card.json", recipe="scripts/assets/unet.py", seed=SEED, seconds=progress.seconds,
        metrics={"oracle_on_256_held_out_prompts": metrics, "steps": steps, "batch": batch},
        notes="Oracle checks of 15-step DDIM samples. One training caption in five is corrupted on purpose.",
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--report-every", type=int, default=1000)
    arguments = parser.parse_args()
    main(arguments.steps, arguments.batch, arguments.report_every)
