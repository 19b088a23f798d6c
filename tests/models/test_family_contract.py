"""The contract of a diffusion family, held by every registered one with a tiny real model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.diffusion.process import DiscreteVP, DynamicShift, Prediction, RectifiedFlow
from mmalign.errors import ConfigError
from mmalign.models.diffusion import FAMILIES
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.models.diffusion.inputs import pair_inputs
from mmalign.types import Geometry, Moments
from tests.fixtures.batches import PROMPTS, context, pair_batch
from tests.fixtures.tiny import VARIANTS, load

Families = Callable[[str], DiffusionFamily]
Folders = Callable[[str], Path]
ENCODING: dict[str, dict[str, Any]] = {
    "sd": {"do_classifier_free_guidance": False}, "sdxl": {"do_classifier_free_guidance": False},
    "sd3": {"do_classifier_free_guidance": False, "prompt_2": None, "prompt_3": None}, "flux": {"prompt_2": None},
}  # fmt: skip
every_variant = pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "schnell"])


def times(family: DiffusionFamily) -> torch.Tensor:
    """Four timesteps of the family's own kind, from almost clean to almost noise."""
    indices = torch.tensor([0, 40, 555, 999])
    return indices if isinstance(family.process, DiscreteVP) else indices / 1000


def geometry(rows: int) -> Geometry:
    numbers = torch.arange(rows)[:, None].expand(rows, 2)
    return Geometry(original=numbers + 512, crop=numbers, target=torch.full((rows, 2), 64))


def plain_pipeline(variant: str, folder: Path) -> Any:
    """What a user of diffusers gets from the folder."""
    import diffusers

    name, extra = {
        "sd": ("StableDiffusionPipeline", {"safety_checker": None}),
        "sdxl": ("StableDiffusionXLPipeline", {}),
        "sd3": ("StableDiffusion3Pipeline", {"text_encoder_3": None, "tokenizer_3": None} if variant == "sd35" else {}),
        "flux": ("FluxPipeline", {}),
    }[VARIANTS[variant].family]
    pipeline = getattr(diffusers, name).from_pretrained(folder, **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_registered_family_is_tested_here() -> None:
    assert {variant.family for variant in VARIANTS.values()} == set(FAMILIES.names())
    with pytest.raises(ConfigError, match="model family 'sdx' is not known; did you mean 'sdxl'"):
        FAMILIES.get("sdx")


@pytest.mark.parametrize(
    ("variant", "prediction"), [("sd1", Prediction.EPSILON), ("sd2", Prediction.V), ("sdxl", Prediction.EPSILON)]
)
def test_the_process_comes_from_the_checkpoint(tiny_family: Families, variant: str, prediction: Prediction) -> None:
    process = tiny_family(variant).process
    assert isinstance(process, DiscreteVP) and process.prediction is prediction and len(process) == 1000
    # sqrt(1 - 0.00085) and the last level of the Stable Diffusion schedule.
    a, s = process.coefficients(torch.tensor([0, 999]))
    assert a[0].item() == pytest.approx(0.9995749, abs=1e-7)
    assert s[1].item() ** 2 == pytest.approx(1 - 0.0046600, abs=1e-5)


@pytest.mark.parametrize(
    ("variant", "shift"), [("sd3", 3.0), ("sd35", 3.0), ("flux", DynamicShift()), ("schnell", 1.0)]
)
def test_the_flow_comes_from_the_checkpoint(tiny_family: Families, variant: str, shift: Any) -> None:
    process = tiny_family(variant).process
    assert isinstance(process, RectifiedFlow) and process.prediction is Prediction.VELOCITY
    assert process.shift == shift and process.logit_normal and (process.mean, process.std) == (0.0, 1.0)
    assert process.network_time(torch.tensor([0.25])).item() == 250.0


@every_variant
def test_shapes(tiny_family: Families, variant: str) -> None:
    family = tiny_family(variant)
    flow = isinstance(family.process, RectifiedFlow)
    assert family.latent_shape == (16 if flow else 4, 8, 8) and family.latent_factor == 8
    assert family.image_multiple == (16 if flow else 8)
    assert {"attention", "all"} <= set(family.lora_targets)


@every_variant
def test_pictures_become_the_posterior_of_the_vae(tiny_family: Families, tiny_folder: Folders, variant: str) -> None:
    from diffusers import AutoencoderKL

    family, pixels = tiny_family(variant), pair_batch(3).chosen.pixels
    assert pixels is not None
    found = family.encode_images(pixels)
    vae = AutoencoderKL.from_pretrained(tiny_folder(variant), subfolder="vae").eval()
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(found.mean, posterior.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.std, posterior.std, rtol=1e-5, atol=1e-5)
    assert found.mean.shape == (3, *family.latent_shape) and found.mean.dtype is torch.float32
    assert not found.mean.requires_grad and found.std.min() > 0
    for index in range(3):
        alone = family.encode_images(pixels[index : index + 1])
        torch.testing.assert_close(alone.mean, found.mean[index : index + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "factor", "shift"),
    [("sd1", 0.18215, 0), ("sd2", 0.18215, 0), ("sdxl", 0.13025, 0), ("sd3", 1.5305, 0.0609), ("flux", 0.3611, 0.1159)],
)
def test_latents_are_scaled_posterior_samples(tiny_family: Families, variant: str, factor: float, shift: float) -> None:
    family = tiny_family(variant)
    mean, std, noise = torch.randn(3, 2, *family.latent_shape).unbind(0)
    found = family.latents(Moments(mean=mean, std=std.abs()), noise)
    torch.testing.assert_close(found, factor * (mean + std.abs() * noise - shift))


def test_a_shift_factor_is_taken_off_before_scaling(tiny_folder: Folders, tmp_path: Path) -> None:
    """(z - shift) scale, as the published sixteen-channel VAEs define it; and the pipeline undoes it."""
    folder = changed(tiny_folder("sd1"), tmp_path, "vae/config.json", scaling_factor=1.5305, shift_factor=0.0609)
    family = load("sd1", folder)
    raw = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(family.scale(raw), (raw - 0.0609) * 1.5305)


def changed(folder: Path, into: Path, file: str, **values: Any) -> Path:
    """A copy of a model folder with some values of one JSON file replaced."""
    copied = into / "model"
    shutil.copytree(folder, copied)
    settings = json.loads((copied / file).read_text())
    (copied / file).write_text(json.dumps({**settings, **values}))
    return copied


@every_variant
def test_prompts_are_encoded_as_the_plain_pipeline_does(
    tiny_family: Families, tiny_folder: Folders, variant: str
) -> None:
    family = tiny_family(variant)
    found = family.encode_prompts(PROMPTS)
    pipeline = plain_pipeline(variant, tiny_folder(variant))
    with torch.no_grad():
        expected = pipeline.encode_prompt(
            list(PROMPTS), device=torch.device("cpu"), num_images_per_prompt=1, **ENCODING[VARIANTS[variant].family]
        )
    cond = family.conditioning(found, geometry(len(PROMPTS)))
    torch.testing.assert_close(cond.tokens, expected[0], rtol=1e-5, atol=1e-5)
    if variant not in ("sd1", "sd2"):
        pooled = expected[1 if VARIANTS[variant].family == "flux" else 2]
        torch.testing.assert_close(cond.pooled, pooled, rtol=1e-5, atol=1e-5)
    assert all(value.dtype is torch.float32 and len(value) == len(PROMPTS) for value in found.values())
    assert not torch.equal(cond.tokens[0], cond.tokens[1])


@every_variant
def test_a_prompt_is_encoded_the_same_alone_and_in_a_batch(tiny_family: Families, variant: str) -> None:
    together = tiny_family(variant).encode_prompts(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        for name, value in tiny_family(variant).encode_prompts([prompt]).items():
            torch.testing.assert_close(value, together[name][index : index + 1], rtol=1e-4, atol=1e-5)


@every_variant
def test_a_prompt_longer_than_the_encoder_reads_is_cut(tiny_family: Families, variant: str) -> None:
    words = "a red circle " * (40 if variant.startswith("sd") and variant != "sd3" else 300)
    found = tiny_family(variant).encode_prompts([words, words + "and a blue star"])
    lengths = {name: value.shape[1] for name, value in found.items() if value.ndim == 3}
    assert lengths == {
        "sd1": {"tokens": 20}, "sd2": {"tokens": 20}, "sdxl": {"tokens": 20}, "sd3": {"clip": 20, "t5": 256},
        "sd35": {"clip": 20}, "flux": {"t5": 512}, "schnell": {"t5": 512},
    }[variant]  # fmt: skip
    assert all(torch.equal(value[0], value[1]) for value in found.values())


@every_variant
def test_one_call_serves_every_sample_at_its_own_timestep(tiny_family: Families, variant: str) -> None:
    family = tiny_family(variant)
    noisy, t = torch.randn(4, *family.latent_shape), times(family)
    cond = family.conditioning(family.encode_prompts(PROMPTS), geometry(4))
    with torch.no_grad():
        together = family.predict(family.network, noisy, t, cond)
        for index in range(4):
            cut = slice(index, index + 1)
            alone = family.predict(family.network, noisy[cut], t[cut], cond.map(lambda value, cut=cut: value[cut]))
            torch.testing.assert_close(alone, together[cut], rtol=1e-4, atol=1e-5)
        swapped = family.predict(family.network, noisy, t.flip(0), cond)
    assert together.shape == noisy.shape
    assert (swapped - together).abs().max() > 1e-2  # the timestep matters


@every_variant
def test_the_prompt_matters_and_for_sdxl_pooled_vector_size_and_crop(tiny_family: Families, variant: str) -> None:
    family = tiny_family(variant)
    noisy, t = torch.randn(1, *family.latent_shape).expand(2, -1, -1, -1), times(family)[2:3].expand(2)
    cond = family.conditioning(family.encode_prompts(PROMPTS[:2]), geometry(1).to("cpu"))
    same_text = {
        name: value[:1].expand(2, *value.shape[1:]) for name, value in family.encode_prompts(PROMPTS[:1]).items()
    }
    with torch.no_grad():
        if variant != "sdxl":
            first, second = family.predict(family.network, noisy, t, cond)
            assert (first - second).abs().max() > 1e-4
            return
        plain = family.conditioning(same_text, geometry(2))
        assert plain.extras["time_ids"].tolist() == [[512, 512, 0, 0, 64, 64], [513, 513, 1, 1, 64, 64]]
        first, second = family.predict(family.network, noisy, t, plain)
        assert (first - second).abs().max() > 1e-5


@pytest.mark.parametrize("variant", ["sd1", "sd2", "sdxl"])
def test_predict_is_the_plain_network(tiny_family: Families, variant: str) -> None:
    family = tiny_family(variant)
    inputs = pair_inputs(family, pair_batch(2), context())
    added: dict[str, Any] = {}
    if variant == "sdxl":
        added = {"added_cond_kwargs": {"text_embeds": inputs.cond.pooled, "time_ids": inputs.cond.extras["time_ids"]}}
    with torch.no_grad():
        expected = family.network(inputs.latents, inputs.t, inputs.cond.tokens, **added).sample
        found = family.predict(family.network, inputs.latents, inputs.t, inputs.cond)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", ["sd1", "sdxl", "sd3", "flux"])
def test_bfloat16_runs_in_bfloat16_on_float32_latents(
    tiny_folder: Folders, tiny_family: Families, variant: str
) -> None:
    family, exact = load(variant, tiny_folder(variant), dtype="bf16"), tiny_family(variant)
    inputs = pair_inputs(exact, pair_batch(2), context())
    with torch.no_grad():
        found = family.predict(family.network, inputs.latents, inputs.t, inputs.cond)
        expected = exact.predict(exact.network, inputs.latents, inputs.t, inputs.cond)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    # T5 keeps its own precision, which loses nothing.
    kinds = {name: value.dtype for name, value in family.encode_prompts(PROMPTS).items()}
    assert kinds == {name: torch.bfloat16 if name == "t5" else torch.float32 for name in kinds}
    # The VAE stays exact whatever the denoiser runs in.
    pixels = pair_batch(1).chosen.pixels
    assert pixels is not None
    assert torch.equal(family.encode_images(pixels).mean, exact.encode_images(pixels).mean)


@every_variant
def test_a_copied_network_has_the_starting_weights(tiny_family: Families, variant: str) -> None:
    family = tiny_family(variant)
    copied = family.copy_network()
    for (name, value), (_, own) in zip(copied.named_parameters(), family.network.named_parameters(), strict=True):
        assert torch.equal(value, own) and not value.requires_grad, name


@every_variant
def test_text_encoders_and_vae_are_read_when_needed_and_can_be_released(tiny_folder: Folders, variant: str) -> None:
    family: Any = load(variant, tiny_folder(variant))
    assert not any(isinstance(part, torch.nn.Module) for part in family._parts.values())
    text = family.encode_prompts(["a star"])
    assert "vae" not in family._parts
    pixels, raw = pair_batch(1).chosen.pixels, torch.ones(1, *family.latent_shape)
    mean, scaled = family.encode_images(pixels).mean, family.scale(raw)
    family.release()
    assert not any(isinstance(part, torch.nn.Module) for part in family._parts.values())
    # What a cached run needs is still known without reading the VAE again.
    assert torch.equal(family.scale(raw), scaled) and family.latent_factor == 8 and "vae" not in family._parts
    assert all(torch.equal(value, text[name]) for name, value in family.encode_prompts(["a star"]).items())
    assert torch.equal(family.encode_images(pixels).mean, mean)


def test_frozen_parts_stay_frozen_and_in_evaluation_mode(tiny_family: Families) -> None:
    family: Any = tiny_family("sdxl")
    for name in ("vae", "text_encoder", "text_encoder_2"):
        part = family._part(name)
        assert not part.training and not any(value.requires_grad for value in part.parameters())


@every_variant
def test_the_fingerprint_names_everything_that_fills_a_cache(
    tiny_family: Families, tiny_folder: Folders, tmp_path: Path, variant: str
) -> None:
    family = tiny_family(variant)
    again = load(variant, tiny_folder(variant))
    for part in ("vae", "text"):
        assert family.fingerprint(part) == again.fingerprint(part)  # type: ignore[arg-type]
        json.dumps(family.fingerprint(part))  # type: ignore[arg-type]
    assert family.fingerprint("vae") != family.fingerprint("text")
    other = load(variant, changed(tiny_folder(variant), tmp_path, "vae/config.json", scaling_factor=0.5))
    assert other.fingerprint("vae") != family.fingerprint("vae") and other.fingerprint("text") == family.fingerprint(
        "text"
    )
    with torch.no_grad():
        next(other._part("vae").parameters()).add_(1e-3)  # type: ignore[attr-defined]
        next(other._part("text_encoder").parameters()).add_(1e-3)  # type: ignore[attr-defined]
    other._hashes.clear()  # type: ignore[attr-defined]
    assert other.fingerprint("vae")["vae"]["weights"] != family.fingerprint("vae")["vae"]["weights"]
    assert other.fingerprint("text") != family.fingerprint("text")
    half = load(variant, tiny_folder(variant), dtype="bf16")
    assert half.fingerprint("vae") == family.fingerprint("vae") and half.fingerprint("text") != family.fingerprint(
        "text"
    )


def test_the_whole_tokenizer_counts_and_its_use_does_not(tiny_folder: Folders) -> None:
    """Another vocabulary is not the only way in which a text becomes other tokens."""
    from tokenizers import normalizers

    def text(family: Any) -> Any:
        family._hashes.clear()
        return family.fingerprint("text")

    family: Any = load("sd1", tiny_folder("sd1"))
    before = text(family)
    family.encode_prompts(["a star", "a longer star"])
    family._part("tokenizer")("a star", padding="max_length", max_length=9, truncation=True)
    assert text(family) == before
    tokenizer = family._part("tokenizer")
    kept = tokenizer.backend_tokenizer.normalizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    assert text(family) != before
    tokenizer.backend_tokenizer.normalizer = kept
    assert text(family) == before
    tokenizer.padding_side = "left"
    assert text(family) != before


def test_another_denoiser_and_another_vae(tiny_folder: Folders, tiny_family: Families) -> None:
    """Starting from a fine-tuned network, and with a VAE that was repaired for half precision."""
    plain, second = tiny_family("sd1"), tiny_family("sd2")
    mixed = load(
        "sd1", tiny_folder("sd1"), network_path=str(tiny_folder("sd2")), vae_path=str(tiny_folder("sd2") / "vae")
    )
    assert torch.equal(next(mixed.network.parameters()), next(second.network.parameters()))
    assert mixed.fingerprint("vae") == second.fingerprint("vae")
    assert mixed.fingerprint("text") == plain.fingerprint("text")
    assert mixed.process.prediction is Prediction.EPSILON
