"""Pictures: the same as the plain pipeline's, whatever the batch split, and after the adapter has left the house."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.models.adapters import lora_state
from mmalign.models.diffusion.base import DiffusionFamily
from tests.fixtures.batches import lora_policy
from tests.fixtures.tiny import VARIANTS
from tests.models.test_family_contract import plain_pipeline

Families = Callable[[str], DiffusionFamily]
Folders = Callable[[str], Path]
every_variant = pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "schnell"])
PROMPTS = ("a large red circle on a grey background", "two blue stars on a white background", "")
STEPS, GUIDANCE = 4, 5.0


def initial(number: int = 3, channels: int = 4) -> torch.Tensor:
    return torch.randn(number, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def sample(family: DiffusionFamily, network: Any, **changes: Any) -> np.ndarray:
    settings = {"steps": STEPS, "guidance": GUIDANCE, "batch_size": 3, **changes}
    return family.sample(network, PROMPTS, initial(channels=family.latent_shape[0]), **settings)


def plainly(pipeline: Any) -> np.ndarray:
    latents = initial()
    if hasattr(pipeline, "transformer"):
        latents = initial(channels=16)
    if hasattr(pipeline, "_pack_latents"):
        latents = pipeline._pack_latents(latents, 3, 16, 8, 8)
    images = pipeline(
        list(PROMPTS), latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
        height=64, width=64,
    ).images  # fmt: skip
    return (images * 255).round().astype(np.uint8)


def apart(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())


@pytest.fixture(scope="module")
def untrained(tiny_family: Families, tiny_folder: Folders) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """Pictures of a variant before any training, ours and the plain pipeline's; made once."""

    @cache
    def pictures(variant: str) -> tuple[np.ndarray, np.ndarray]:
        family = tiny_family(variant)
        return sample(family, family.network), plainly(plain_pipeline(variant, tiny_folder(variant)))

    return pictures


Untrained = Callable[[str], tuple[np.ndarray, np.ndarray]]


@every_variant
def test_sampling_is_a_plain_pipeline_call(untrained: Untrained, variant: str) -> None:
    found, plain = untrained(variant)
    assert found.shape == (3, 64, 64, 3) and found.dtype == np.uint8 and found.std() > 10
    assert apart(found, plain) <= 1


@every_variant
def test_the_batch_split_does_not_matter_and_progress_counts_pictures(
    tiny_family: Families, untrained: Untrained, variant: str
) -> None:
    family, counted = tiny_family(variant), []
    found = sample(family, family.network, batch_size=2, progress=counted.append)
    assert counted == [2, 1]
    assert apart(found, untrained(variant)[0]) <= 1


def test_a_second_call_gives_the_same_pictures(tiny_family: Families) -> None:
    """Schedulers keep state between calls; it must not leak into the next one."""
    family = tiny_family("sd1")
    first = sample(family, family.network)
    sample(family, family.network, steps=7)
    assert np.array_equal(first, sample(family, family.network))


def test_prompt_noise_and_guidance_matter(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    base = sample(family, family.network)
    assert apart(base, sample(family, family.network, guidance=1.0)) > 1
    other = family.sample(family.network, PROMPTS[::-1], initial(), steps=STEPS, guidance=GUIDANCE, batch_size=3)
    assert apart(base, other) > 1
    turned = family.sample(family.network, PROMPTS, initial().flip(0), steps=STEPS, guidance=GUIDANCE, batch_size=3)
    assert apart(base, turned) > 1


def test_training_mode_is_given_back_even_after_an_error(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    policy = lora_policy(family)
    assert policy.training
    family.sample(policy, PROMPTS[:1], initial(1), steps=1, guidance=1.0, batch_size=1)
    assert policy.training
    policy.eval()
    family.sample(policy, PROMPTS[:1], initial(1), steps=1, guidance=1.0, batch_size=1)
    assert not policy.training
    policy.train()
    with pytest.raises(KeyboardInterrupt):
        family.sample(policy, PROMPTS[:1], initial(1), steps=1, guidance=1.0, batch_size=1, progress=_interrupt)
    assert policy.training


def _interrupt(finished: int) -> None:
    raise KeyboardInterrupt


@every_variant
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_saved_adapter_loads_in_a_plain_pipeline_and_gives_the_same_pictures(
    tiny_family: Families, tiny_folder: Folders, untrained: Untrained, tmp_path: Path, variant: str, targets: str
) -> None:
    family = tiny_family(variant)
    # alpha is twice the rank: a reader that forgets it gets half the adapter.
    policy = lora_policy(family, rank=4, alpha=8.0, targets=targets, moved=0.3)
    settings = {"r": 4, "lora_alpha": 8.0, "target_modules": list(family.lora_targets[targets])}
    written = family.save_lora(lora_state(policy), tmp_path, settings)
    assert written == tmp_path / "pytorch_lora_weights.safetensors" and written.is_file()
    pipeline = plain_pipeline(variant, tiny_folder(variant))
    pipeline.load_lora_weights(tmp_path)
    ours = sample(family, policy)
    assert apart(ours, untrained(variant)[0]) > 20, "the adapter does nothing here"
    assert apart(ours, plainly(pipeline)) <= 1
    pipeline.unload_lora_weights()
    assert apart(plainly(pipeline), untrained(variant)[1]) <= 1
