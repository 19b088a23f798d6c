"""The prior of Stable Cascade, whose attention reads picture and prompt together and hands nothing down."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.errors import ModelError
from mmalign.models.users.adapter import AdapterSettings, attach, load, save, sites
from mmalign.models.users.blend import made_for, persons
from tests.models.users.test_user_attention import DIM, ROWS, spoil, users


def prior() -> Any:
    from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = StableCascadeUNet(
            in_channels=4, out_channels=4, conditioning_dim=16, block_out_channels=(16, 16), num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), clip_text_in_channels=8,
            clip_text_pooled_in_channels=8, clip_image_in_channels=8, dropout=(0.0, 0.0), switch_level=(False,),
        )  # fmt: skip
        for value in network.parameters():  # its zero starts would hide everything
            value.data += 0.05 * torch.randn_like(value)
    return network.eval().requires_grad_(False)


def asked(network: Any, rows: int = 3, times: int = 1, **words: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, pooled = torch.randn(rows, 4, 6, 6, generator=generator), torch.randn(rows, 1, 8, generator=generator)
    text, image = torch.randn(rows, 5, 8, generator=generator), torch.randn(rows, 1, 8, generator=generator)
    again = [value.repeat(times, *([1] * (value.ndim - 1))) for value in (sample, pooled, text, image)]
    ratio = torch.full((rows * times,), 0.4)
    found: Tensor = network(
        again[0], ratio, clip_text_pooled=again[1], clip_text=again[2], clip_img=again[3], return_dict=False, **words
    )[0]
    return found


def personal() -> Any:
    network = prior()
    spoil(attach(network, AdapterSettings(rows=ROWS, dim=DIM), seed=3))
    return network


@torch.no_grad()
def test_nobody_is_the_base_and_rows_are_their_single_runs(tmp_path: Path) -> None:
    network, base, who = personal(), asked(prior()), users(3)
    assert len(sites(network)) == 4
    assert torch.equal(asked(network), base)
    assert torch.equal(asked(network, user=(who, torch.zeros(3, 1))), base)
    together = asked(network, user=(who, torch.ones(3, 1)))
    assert not torch.allclose(together, base, atol=1e-3)
    one = asked(network, user=(who, torch.tensor([[0.0], [1.0], [0.0]])))
    torch.testing.assert_close(one[1], together[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(one[0], base[0]) and torch.equal(asked(network), base), "nothing is held after a call"
    again = prior()
    save(network, tmp_path)
    load(again, tmp_path)
    assert torch.equal(asked(again, user=(who, torch.ones(3, 1))), together)


@torch.no_grad()
def test_its_pipeline_puts_the_prompted_rows_first() -> None:
    network = personal()
    a = users(1)[0, 0]
    with made_for(network, persons([[(a, 1.0)]] * 3)):
        both = asked(network, times=2)
    torch.testing.assert_close(both[3:], asked(prior()), atol=1e-6, rtol=1e-6)
    expected = asked(network, user=(a.expand(3, 1, -1, -1), torch.ones(3, 1)))
    torch.testing.assert_close(both[:3], expected, atol=1e-6, rtol=1e-6)


def test_gradients_reach_the_values_and_checkpointing_is_refused() -> None:
    network = prior()
    adapter = attach(network, AdapterSettings(rows=ROWS, dim=DIM), seed=3)
    words = {"user": (users(3), torch.ones(3, 1))}
    asked(network, **words).square().sum().backward()
    moved = {name for name, value in adapter.named_parameters() if value.grad is not None and bool(value.grad.any())}
    assert moved == {name for name, _ in adapter.named_parameters() if name.endswith("to_v_user.weight")}
    network.enable_gradient_checkpointing()
    with pytest.raises(ModelError, match="would recompute without the user"):
        asked(network, **words)
    assert copy.deepcopy(network) is not network
