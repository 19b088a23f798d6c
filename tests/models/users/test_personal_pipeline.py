"""User attention inside plain diffusers pipelines."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.errors import ConfigError, ModelError
from mmalign.models.users.adapter import AdapterSettings, adapter_of, attach, detached
from mmalign.models.users.pipeline import PersonalPipeline, ip_adapter_embedding, ip_adapter_state
from mmalign.models.users.store import UserStore
from tests.models.test_family_contract import plain_pipeline
from tests.models.users.test_user_attention import DIM, ROWS, spoil

Folders = Callable[[str], Path]
STEPS = 2


def personal(folder: Callable[[str], Path], variant: str, tmp_path: Path) -> PersonalPipeline:
    pipeline = plain_pipeline(variant, folder(variant))
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    spoil(attach(network, AdapterSettings(rows=ROWS, dim=DIM), seed=3))
    store = UserStore.create(tmp_path / "users", encoder={})
    for seed, name in enumerate(("alice", "bob")):
        store.add(name, torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(seed)), kind="encoded")
    return PersonalPipeline(pipeline, store=store)


def call(pipeline: Any, prompts: list[str], seeds: list[int], **words: Any) -> np.ndarray:
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return np.asarray(
        pipeline(prompts, num_inference_steps=STEPS, output_type="np", generator=noise, **words).images
    )


@pytest.mark.parametrize("variant", ["sd1", "sdxl", "sd3"])
def test_several_users_in_one_call_are_their_single_calls(tiny_folder: Folders, tmp_path: Path, variant: str) -> None:
    pipeline = personal(tiny_folder, variant, tmp_path)
    prompts, words = ["a cat", "a dog"], {"guidance_scale": 4.0}
    together = call(pipeline, prompts, [1, 2], user=["alice", "bob"], **words)
    alone = [call(pipeline, [prompt], [seed], user=user, **words)[0]
             for prompt, seed, user in zip(prompts, (1, 2), ("alice", "bob"), strict=True)]  # fmt: skip
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    other = call(pipeline, prompts, [1, 2], user=["alice", "alice"], **words)
    np.testing.assert_array_equal(other[0], together[0])
    assert np.abs(other[1] - together[1]).max() > 1e-3
    several = call(pipeline, prompts, [1, 3, 2, 4], user=["alice", "bob"], num_images_per_prompt=2, **words)
    np.testing.assert_allclose(several[[0, 2]], together, atol=1e-5)


def test_without_a_user_and_at_scale_zero_it_is_the_plain_pipeline(tiny_folder: Folders, tmp_path: Path) -> None:
    pipeline = personal(tiny_folder, "sd1", tmp_path)
    plain = call(plain_pipeline("sd1", tiny_folder("sd1")), ["a cat", "a dog"], [1, 2])
    np.testing.assert_array_equal(call(pipeline, ["a cat", "a dog"], [1, 2]), plain)
    np.testing.assert_array_equal(call(pipeline, ["a cat", "a dog"], [1, 2], user="alice", user_scale=0.0), plain)
    assert np.abs(call(pipeline, ["a cat", "a dog"], [1, 2], user="alice") - plain).max() > 1e-3
    half = call(pipeline, ["a cat", "a dog"], [1, 2], user=["alice", None])
    np.testing.assert_allclose(half[1], plain[1], atol=1e-6)
    mixed = call(pipeline, ["a cat"], [1], user={"alice": 0.5, "bob": 0.5}, user_guidance=1.5, user_mode="attention")
    assert np.isfinite(mixed).all() and np.abs(mixed[0] - plain[0]).max() > 1e-3


def test_mistakes_are_refused(tiny_folder: Folders, tmp_path: Path) -> None:
    pipeline = personal(tiny_folder, "sd1", tmp_path)
    with pytest.raises(ConfigError, match="1 users for 2 prompts"):
        call(pipeline, ["a cat", "a dog"], [1, 2], user=["alice"])
    with pytest.raises(ConfigError, match="no user 'carol' here"):
        call(pipeline, ["a cat"], [1], user="carol")
    pipeline.pipeline.enable_attention_slicing()
    with pytest.raises(ModelError, match="was replaced by"):
        call(pipeline, ["a cat"], [1], user="alice")
    with pytest.raises(ModelError, match="carries no user adapter"):
        PersonalPipeline(plain_pipeline("sd1", tiny_folder("sd1")))


def test_a_saved_pipeline_keeps_its_users_and_plain_diffusers_says_so(
    tiny_folder: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import diffusers

    pipeline = personal(tiny_folder, "sd1", tmp_path)
    expected = call(pipeline, ["a cat"], [1], user="bob")
    with pytest.raises(ModelError, match="would lose"):
        pipeline.pipeline.save_pretrained(tmp_path / "lost")
    folder = pipeline.save_pretrained(tmp_path / "kept")
    np.testing.assert_array_equal(call(pipeline, ["a cat"], [1], user="bob"), expected)
    again = PersonalPipeline.from_pretrained(folder, safety_checker=None)
    again.pipeline.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(call(again, ["a cat"], [1], user="bob"), expected)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_warning()
    try:
        plain = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    finally:
        logger.removeHandler(caplog.handler)
        diffusers.utils.logging.set_verbosity(before)
    assert "mmalign_user_adapter" in caplog.text
    assert adapter_of(plain.unet) is None


@pytest.mark.parametrize("variant", ["sd1", "sdxl"])
def test_plain_diffusers_reads_it_as_an_ip_adapter(tiny_folder: Folders, tmp_path: Path, variant: str) -> None:
    from safetensors.torch import save_file

    pipeline = personal(tiny_folder, variant, tmp_path)
    network = pipeline.network
    save_file(ip_adapter_state(network), tmp_path / "ip_adapter.safetensors")
    assert pipeline.store is not None
    embedding = pipeline.store.get("alice")
    expected = call(pipeline, ["a cat"], [1], user="alice", guidance_scale=1.0)
    plain = plain_pipeline(variant, tiny_folder(variant))
    plain.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
    plain.set_ip_adapter_scale(1.0)
    found = call(plain, ["a cat"], [1], guidance_scale=1.0, ip_adapter_image_embeds=[ip_adapter_embedding(network, embedding)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with detached(network):
        base = call(pipeline.pipeline, ["a cat"], [1], guidance_scale=1.0)
    assert np.abs(found - base).max() > 1e-3
