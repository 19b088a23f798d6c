"""Shared and plain layouts, packed rows and a naive pass of plain transformers give one and the same log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign.branches import BranchBatch, BranchRecord
from mmalign.errors import ModelError
from mmalign.models.adapters import attach_lora
from mmalign.models.vlm.base import VlmFamily
from tests.fixtures.tiny_vlm import VARIANTS, clip, load, picture, record

Loaded = Callable[[str], VlmFamily]
SHORT, LONG = "yes", "there is nothing here, two green triangles and one yellow star on a grey ground"


def records(kind: str) -> list[BranchRecord]:
    """Three prompts with one, two and three answers of unequal lengths: none, the same, or different media."""
    media: list[list[Any]] = {
        "text": [[], [], []],
        "image": [[picture(1)], [picture(2, (64, 30)), picture(1)], [picture(1)]],
        "video": [[clip(1)], [clip(2, 2)], []],
    }[kind]
    answers = [(LONG,), (SHORT, LONG), ("a red circle", SHORT, "no no")]
    prompts = ("What is in the picture?", "Describe what happens in the clip. Is there a star?", "Frame?")
    return [
        record(str(number), media=media[number], answers=answers[number], prompt=prompts[number]) for number in range(3)
    ]


def batch_of(family: VlmFamily, kind: str) -> BranchBatch:
    return family.collate([family.encode(item) for item in records(kind)])


def gradients(family: VlmFamily, batch: BranchBatch, **settings: Any) -> tuple[Tensor, Tensor]:
    """Sums [R], and the gradient of a fixed mixture of them over all parameters, vision tower included."""
    network = family.network.requires_grad_(True)
    network.zero_grad()
    found = family.log_probs(network, batch, **settings).sum
    (found * torch.linspace(-1.0, 1.5, len(found))).sum().backward()
    flat = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in network.parameters()]
    network.zero_grad()
    return found.detach(), torch.cat(flat)


KINDS = [
    (name, kind) for name, variant in VARIANTS.items() for kind in ("image", "video")[: 1 + variant.video]
] + [("llava", "text"), ("qwen2_5_vl", "text"), ("gemma3", "text")]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_shared_and_plain_agree_in_values_and_gradients(name: str, kind: str, tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family(name)
    batch = batch_of(family, kind)
    shared, shared_slope = gradients(family, batch, prefix="shared")
    plain, plain_slope = gradients(family, batch, prefix="plain")
    assert torch.allclose(shared, plain, rtol=1e-5, atol=1e-5)
    assert (shared_slope - plain_slope).norm() <= 1e-5 * plain_slope.norm()


def naive(family: VlmFamily, item: BranchRecord) -> list[float]:
    """Every answer alone through the model's own forward: raw pixels, its own positions, full logits."""
    out = []
    example = family.encode(item)
    for row in example.rows:
        for ids in row.branches:
            text = torch.cat([row.prefix, ids])[None]
            inputs: dict[str, Any] = {"input_ids": text, "attention_mask": torch.ones_like(text)}
            for kind in ("image", "video"):
                units = [unit for unit in row.units if unit.kind == kind]
                if units:
                    inputs |= raw(family, kind, [dict(unit.tensors) for unit in units])
            if name_of(family) in ("Qwen25VL", "Qwen3VL"):
                inputs["mm_token_type_ids"] = family.token_types(text)
            if name_of(family) == "Gemma3":
                inputs["token_type_ids"] = family.token_types(text)
            with torch.no_grad():
                logits = family.network(**inputs).logits[0]
            places = torch.arange(len(row.prefix) - 1, len(row.prefix) - 1 + len(ids))
            out.append(logits[places].log_softmax(-1)[torch.arange(len(ids)), ids].sum().item())
    return out


def name_of(family: VlmFamily) -> str:
    return type(family).__name__


def raw(family: VlmFamily, kind: str, units: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pixels as the processor hands them to the model."""
    name = name_of(family)
    if name in ("Qwen25VL", "Qwen3VL"):
        return {key: torch.cat([u[key] for u in units]) if key.startswith("pixel") else torch.stack([u[key] for u in units])
                for key in units[0]}  # fmt: skip
    if name in ("SmolVLM", "Idefics3"):
        return {key: torch.stack([u[key] for u in units])[None] for key in units[0]}
    if "image_sizes" in units[0]:
        most = max(len(u["pixel_values"]) for u in units)
        padded = [nn.functional.pad(u["pixel_values"], (0, 0, 0, 0, 0, 0, 0, most - len(u["pixel_values"]))) for u in units]
        return {"pixel_values": torch.stack(padded), "image_sizes": torch.stack([u["image_sizes"] for u in units])}
    return {key: torch.stack([u[key] for u in units]) for key in units[0]}


@pytest.mark.parametrize(("name", "kind"), [pair for pair in KINDS if pair[1] != "text"])
def test_both_equal_a_naive_pass_of_the_library(name: str, kind: str, tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family(name)
    wanted = [value for item in records(kind) for value in naive(family, item)]
    with torch.no_grad():
        found = family.log_probs(family.network, batch_of(family, kind), prefix="shared")
    assert found.sum.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava_next"])
def test_packed_rows_give_the_same(name: str, tiny_vlm_family: Loaded, tiny_vlm_folder: Callable[[str], Path]) -> None:
    wanted = tiny_vlm_family(name)
    batch = batch_of(wanted, "image")
    packed = load(name, tiny_vlm_folder(name), row_tokens=2 * batch.input_ids.shape[1])
    packed.network.requires_grad_(False)
    with torch.no_grad():
        one, other = (family.log_probs(family.network, batch).sum for family in (wanted, packed))
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_flex_attention_gives_the_same(tiny_vlm_family: Loaded, tiny_vlm_folder: Callable[[str], Path]) -> None:
    wanted, flex = tiny_vlm_family("llava"), load("llava", tiny_vlm_folder("llava"), attention="flex")
    batch = batch_of(wanted, "image")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        one, other = (family.log_probs(family.network, batch).sum for family in (wanted, flex))
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-4)


def test_eager_attention_gives_the_same(tiny_vlm_family: Loaded, tiny_vlm_folder: Callable[[str], Path]) -> None:
    wanted, eager = tiny_vlm_family("smolvlm"), load("smolvlm", tiny_vlm_folder("smolvlm"), attention="eager")
    batch = batch_of(wanted, "image")
    with torch.no_grad():
        one, other = (family.log_probs(family.network, batch).sum for family in (wanted, eager))
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(tiny_vlm_family: Loaded, tiny_vlm_folder: Callable[[str], Path]) -> None:
    wanted = tiny_vlm_family("qwen2_5_vl")
    other = load("qwen2_5_vl", tiny_vlm_folder("qwen2_5_vl"), gradient_checkpointing=True)
    other.network.train()
    batch = batch_of(wanted, "image")
    for prefix in ("shared", "plain"):
        values, slope = gradients(wanted, batch, prefix=prefix)
        again, slope_again = gradients(other, batch, prefix=prefix)
        assert torch.allclose(values, again, rtol=1e-6)
        assert (slope - slope_again).norm() <= 1e-6 * slope.norm()


FOUR = ["llava", "qwen2_5_vl", "smolvlm", "internvl"]


@pytest.mark.parametrize("name", FOUR)
def test_answers_of_one_token(name: str, tiny_vlm_folder: Callable[[str], Path]) -> None:
    """Cut to their first token, both answers are read from the prompt's last state alone: one row, one batch of one."""
    family = load(name, tiny_vlm_folder(name), max_answer=1)
    item = record("a", media=[picture(1), picture(2, (96, 40))], answers=("yes", "no"))
    example = family.encode(item)
    assert [len(ids) for ids in example.rows[0].branches] == [1, 1]
    batch = family.collate([example])
    shared, shared_slope = gradients(family, batch, prefix="shared")
    plain, plain_slope = gradients(family, batch, prefix="plain")
    assert torch.allclose(shared, plain, rtol=1e-5, atol=1e-5)
    assert (shared_slope - plain_slope).norm() <= 1e-5 * plain_slope.norm()
    assert shared.tolist() == pytest.approx(naive(family, item), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", FOUR)
def test_adapters_under_checkpointing_in_shared_rows_equal_plain_rows_without(
    name: str, tiny_vlm_folder: Callable[[str], Path]
) -> None:
    found = []
    for prefix, again in (("shared", True), ("plain", False)):
        family = load(name, tiny_vlm_folder(name), gradient_checkpointing=again)
        policy = attach_lora(family.network, rank=2, alpha=4, targets=family.lora_targets["language"], seed=0).train()
        trained = [value for value in policy.parameters() if value.requires_grad]
        with torch.no_grad():
            for number, value in enumerate(trained):
                value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
        sums = family.log_probs(policy, batch_of(family, "image"), prefix=prefix).sum  # type: ignore[arg-type]
        (sums * torch.linspace(-1.0, 1.5, len(sums))).sum().backward()
        found.append((sums.detach(), torch.cat([value.grad.flatten() for value in trained if value.grad is not None])))
    (one, slope), (other, other_slope) = found
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5) and len(slope) == len(other_slope) > 0
    assert (slope - other_slope).norm() <= 1e-5 * other_slope.norm()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_half_precision_keeps_float32_sums(name: str, tiny_vlm_family: Loaded, tiny_vlm_folder: Callable[[str], Path]) -> None:
    """bfloat16 forward passes, weights in float32 or in bfloat16: sums within 2 % and of float32, in both layouts."""
    wanted, half = tiny_vlm_family(name), load(name, tiny_vlm_folder(name), dtype="bf16")
    batch = batch_of(wanted, "image")
    with torch.no_grad():
        exact = wanted.log_probs(wanted.network, batch).sum
        for weights in (torch.float32, torch.bfloat16):
            half.network.to(weights)
            for prefix in ("shared", "plain"):
                found = half.log_probs(half.network, batch, prefix=prefix).sum  # type: ignore[arg-type]
                assert found.dtype == torch.float32 and torch.allclose(found, exact, rtol=0.02)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_record_alone_equals_the_record_in_a_batch(name: str, tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family(name)
    items = records("image")
    with torch.no_grad():
        together = family.log_probs(family.network, family.collate([family.encode(item) for item in items])).sum
        alone = [family.log_probs(family.network, family.collate([family.encode(item)])).sum for item in items]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_wrong_positions_or_no_mask_would_be_seen(tiny_vlm_family: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance of the tests above is far below what the two usual mistakes do."""
    from dataclasses import replace

    from mmalign.models.vlm import forward

    family = tiny_vlm_family("llava")
    batch = batch_of(family, "image")
    with torch.no_grad():
        right = family.log_probs(family.network, batch).sum
        running = replace(batch, position_ids=torch.arange(batch.input_ids.shape[1]).expand(3, -1))
        assert (family.log_probs(family.network, running).sum - right).abs().max() > 1e-3
        monkeypatch.setattr(forward, "attention_inputs", lambda family, layout: {"attention_mask": None})
        assert (family.log_probs(family.network, batch).sum - right).abs().max() > 1e-3


def test_hidden_pictures_are_seen_by_nobody(tiny_vlm_family: Loaded) -> None:
    """All picture tokens hidden: features do not matter, and both layouts agree."""
    family = tiny_vlm_family("qwen2_5_vl")
    batch = batch_of(family, "image")
    hide = family.image_token_positions(batch)
    counts = [len(features) for features in family.vision_features(family.network, batch).image]
    assert len(counts) == 2 and hide.sum() == 3 * counts[0] + counts[1]
    with torch.no_grad():
        features = family.vision_features(family.network, batch)
        noise = features.map(torch.randn_like)
        shared = family.log_probs(family.network, batch, vision=features, hide=hide).sum
        assert torch.equal(shared, family.log_probs(family.network, batch, vision=noise, hide=hide).sum)
        plain = family.log_probs(family.network, batch, prefix="plain", vision=noise, hide=hide).sum
        assert torch.allclose(shared, plain, rtol=1e-5, atol=1e-5)
        assert (shared - family.log_probs(family.network, batch, vision=features).sum).abs().max() > 1e-3


def test_a_length_that_switches_the_position_encoding_is_refused(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    batch = batch_of(family, "image")
    config = family.text_config
    before = config.rope_parameters
    config.rope_parameters = {**before, "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    try:
        with pytest.raises(ModelError, match=r"switches beyond 16 tokens.*prefix: plain"):
            family.log_probs(family.network, batch)
    finally:
        config.rope_parameters = before


def test_layers_that_carry_a_state_are_refused(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("gemma3")
    config = family.text_config
    before = config.layer_types
    config.layer_types = ["linear_attention", *before[1:]]
    try:
        assert "linear_attention" in str(family.unsharable())
        with pytest.raises(ModelError, match="no mask can fork"):
            family.log_probs(family.network, batch_of(family, "text"))
    finally:
        config.layer_types = before
