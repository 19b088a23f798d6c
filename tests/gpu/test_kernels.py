"""The kernels between matrix products as Triton compiles them, alone and in whole encoders."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmalign import rewards
from mmalign.rewards import clip_net
from mmalign.rewards.clip_net import Block, ClipShape, TowerShape, VisionTower

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 1280])
def test_they_are_as_exact_as_torchs_own(dtype: torch.dtype, width: int) -> None:
    from mmalign.rewards import kernels

    assert kernels.work_on(DEVICE)
    torch.manual_seed(0)
    states, update = (torch.randn(5, 77, width, device=DEVICE, dtype=dtype) * 3 for _ in range(2))
    weight, bias = (torch.randn(width, device=DEVICE, dtype=dtype) for _ in range(2))
    total, normed = kernels.add_layer_norm(states, update, weight, bias, 1e-5)
    assert torch.equal(total, states + update)
    exact = F.layer_norm(total.double(), (width,), weight.double(), bias.double(), 1e-5)
    theirs = F.layer_norm(total, (width,), weight, bias, 1e-5)
    assert float((normed - exact).abs().max()) <= 1.01 * float((theirs - exact).abs().max())
    for activation in ("gelu", "gelu_tanh", "quick_gelu"):
        exact = clip_net._activate(states.double(), activation)
        found = kernels.activate_(states.clone(), activation)
        torch.testing.assert_close(found.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 2**-11, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_is_no_further_from_float32_than_without_them(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = Block(TowerShape(width=320, layers=1, heads=4, mlp=1280, activation="gelu")).to(DEVICE)
    states = torch.randn(3, 50, 320, device=DEVICE)
    with torch.inference_mode():
        exact = block(states, causal=causal)
        block.bfloat16()
        ours = block(states.bfloat16(), causal=causal).float() - exact
        monkeypatch.setattr(clip_net, "_fused", lambda states: False)
        plain = block(states.bfloat16(), causal=causal).float() - exact
    assert float(ours.norm()) <= 1.1 * float(plain.norm())
    assert float(plain.norm()) > 0


@pytest.mark.parametrize(("patch", "size"), [(14, 70), (16, 64)])
def test_the_stem_is_no_further_from_float32_than_without_them(patch: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shape = TowerShape(width=320, layers=1, heads=4, mlp=640)
    tower = VisionTower(
        ClipShape(vision=shape, text=shape, patch=patch, image_size=size, vocabulary=9, context=9, embedding=8)
    ).to(DEVICE)
    pixels = torch.randn(3, 3, size, size, device=DEVICE)
    with torch.inference_mode():
        exact = tower.stem(pixels)
        tower.bfloat16()
        ours = tower.stem(pixels).float() - exact
        monkeypatch.setattr(clip_net, "_fused", lambda states: False)
        plain = tower.stem(pixels).float() - exact
    assert 0 < float(ours.norm()) <= 1.1 * float(plain.norm())


def test_scores_in_half_precision_stay_near_those_in_float32() -> None:
    pixels = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    exact = rewards.load("tiny-clip", device="cpu", dtype="fp32").score(pixels, "a red circle")
    found = rewards.load("tiny-clip", device="cuda", dtype="bf16").score(pixels, "a red circle")
    unit = rewards.load("tiny-clip", device="cpu").backend.cosine_unit
    assert float((found - exact).abs().max()) < 0.02 * abs(unit)
