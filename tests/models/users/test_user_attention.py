"""User attention in tiny real denoisers: where it starts, what it adds, what it never does in silence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign.errors import ModelError
from mmalign.models.adapters import attach_lora
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.models.users.adapter import (
    AdapterSettings,
    UserAdapter,
    adapter_of,
    attach,
    detached,
    load,
    save,
    sites,
)
from mmalign.models.users.attention import UserLayer, UserTokens
from mmalign.models.users.blend import made_for, persons
from mmalign.types import Conditioning, Geometry
from tests.fixtures.batches import PROMPTS
from tests.fixtures.tiny import load as load_family

Families = Callable[[str], DiffusionFamily]
Folders = Callable[[str], Path]
VARIANTS = ("sd1", "sd2", "sdxl", "sd3", "sd35")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
ROWS, DIM = 2, 6


def personal(family: DiffusionFamily, *, trained: bool = True, **settings: int) -> nn.Module:
    """A copy of the family's network with user attention; `trained` gives its values weights."""
    network = copy.deepcopy(family.network).requires_grad_(False)
    adapter = attach(network, AdapterSettings(rows=ROWS, dim=DIM, **settings), seed=3)
    if trained:
        spoil(adapter)
    return network


def plain(family: DiffusionFamily) -> nn.Module:
    """A frozen copy of the family's network: kernels round differently for weights that want gradients."""
    return copy.deepcopy(family.network).requires_grad_(False)


@torch.no_grad()
def spoil(adapter: UserAdapter) -> None:
    """Random weights and biases everywhere, large enough to see."""
    generator = torch.Generator().manual_seed(1)
    for value in adapter.parameters():
        value.add_(0.5 * torch.randn(value.shape, generator=generator))


def users(rows: int, seed: int = 0, sets: int = 1) -> Tensor:
    return torch.randn(rows, sets, ROWS, DIM, generator=torch.Generator().manual_seed(seed))


def inputs(family: DiffusionFamily, rows: int = 3) -> tuple[Tensor, Tensor, Conditioning]:
    noisy = torch.randn(rows, *family.latent_shape, generator=torch.Generator().manual_seed(5))
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(rows)]
    size = torch.full((rows, 2), 64)
    geometry = Geometry(original=size, crop=torch.zeros_like(size), target=size)
    t = family.process.sample_t(torch.linspace(0.2, 0.8, rows, dtype=torch.float64), family.latent_shape[1] ** 2)
    return noisy, t, family.conditioning(family.encode_prompts(prompts), geometry)


@torch.no_grad()
def predict(
    family: DiffusionFamily, network: nn.Module, user: Tensor | None = None, weights: Tensor | None = None, rows: int = 3
) -> Tensor:
    noisy, t, cond = inputs(family, rows)
    return family.predict(network, noisy, t, cond if user is None else cond.with_user(user, weights))


# The layer


def test_one_token_adds_its_value_whatever_the_query() -> None:
    layer = UserLayer(4, 6)
    nn.init.normal_(layer.to_v_user.weight)
    token = torch.randn(2, 1, 1, 4)
    found = layer(torch.randn(2, 5, 6), UserTokens(tokens=token, weights=torch.tensor([[1.0], [0.5]])), 2, None)
    expected = token[:, 0] @ layer.to_v_user.weight.T * torch.tensor([1.0, 0.5])[:, None, None]
    torch.testing.assert_close(found, expected.expand(2, 5, 6))


def test_tokens_have_a_softmax_of_their_own_worked_by_hand() -> None:
    layer = UserLayer(1, 1)
    with torch.no_grad():
        layer.to_k_user.weight.fill_(1.0)
        layer.to_v_user.weight.fill_(10.0)
    # Query 1, keys 0 and log 3: weights 1/4 and 3/4, values 0 and 10 log 3.
    log3 = float(torch.tensor(3.0).log())
    user = UserTokens(tokens=torch.tensor([[[[0.0], [log3]]]]), weights=torch.ones(1, 1))
    assert layer(torch.ones(1, 1, 1), user, 1, None).item() == pytest.approx(7.5 * log3, rel=1e-6)


def test_order_and_doubling_of_tokens_change_nothing_and_sets_add_up() -> None:
    layer = UserLayer(4, 6)
    nn.init.normal_(layer.to_v_user.weight)
    query, tokens = torch.randn(2, 5, 6), torch.randn(2, 2, 3, 4)

    def asked(tokens: Tensor, *weights: float) -> Tensor:
        return layer(query, UserTokens(tokens=tokens, weights=torch.tensor([weights] * 2)), 2, None)

    first, second = asked(tokens[:, :1], 1.0), asked(tokens[:, 1:], 1.0)
    torch.testing.assert_close(asked(tokens[:, :1].flip(2), 1.0), first)
    torch.testing.assert_close(asked(tokens[:, :1].repeat(1, 1, 2, 1), 1.0), first)
    torch.testing.assert_close(asked(tokens, 0.3, 0.7), 0.3 * first + 0.7 * second)


def test_rows_of_users_that_do_not_fit_the_samples_are_refused() -> None:
    layer, query = UserLayer(4, 6), torch.randn(4, 5, 6)
    for rows in (2, 8):
        with pytest.raises(ModelError, match=f"{rows} rows of user tokens for 4 samples"):
            layer(query, UserTokens(tokens=torch.randn(rows, 1, 3, 4), weights=torch.ones(rows, 1)), 2, None)


# The network


@every_variant
def test_before_training_the_policy_is_its_reference(tiny_family: Families, variant: str) -> None:
    family = tiny_family(variant)
    network = personal(family, trained=False)
    assert torch.equal(predict(family, network, users(3)), predict(family, plain(family)))
    found = family.predict(network, *inputs(family)[:2], inputs(family)[2].with_user(users(3)))
    found.square().sum().backward()
    for name, value in network.named_parameters():
        if "user_adapter" in name:
            assert value.grad is not None
            assert bool(value.grad.any()) == name.endswith("to_v_user.weight"), name
        else:
            assert value.grad is None


@every_variant
def test_scale_zero_and_nobody_are_the_base_to_the_last_bit(tiny_family: Families, variant: str) -> None:
    family = tiny_family(variant)
    network, base = personal(family), predict(family, plain(family))
    assert not torch.allclose(predict(family, network, users(3)), base, atol=1e-3)
    assert torch.equal(predict(family, network), base)
    assert torch.equal(predict(family, network, users(3), torch.zeros(3, 1)), base)
    # A batch in which only some rows have a user: the others are the base as well, gradients wanted or not.
    mixed = predict(family, network, users(3), torch.tensor([[1.0], [0.0], [1.0]]))
    assert torch.equal(mixed[1], base[1]) and not torch.allclose(mixed[0], base[0], atol=1e-3)
    noisy, t, cond = inputs(family)
    assert torch.equal(family.predict(network, noisy, t, cond.with_user(users(3), torch.zeros(3, 1))).detach(), base)


@every_variant
def test_a_batch_of_different_users_is_their_single_runs(tiny_family: Families, variant: str) -> None:
    family = tiny_family(variant)
    network, who = personal(family), users(3)
    together = predict(family, network, who)
    noisy, t, cond = inputs(family)
    for row in range(3):
        cut = slice(row, row + 1)
        with torch.no_grad():
            alone = family.predict(network, noisy[cut], t[cut], cond.map(lambda value, cut=cut: value[cut]).with_user(who[cut]))
        torch.testing.assert_close(together[cut], alone, atol=1e-5, rtol=1e-5)
    changed = who.clone()
    changed[1] += 1
    again = predict(family, network, changed)
    assert torch.equal(again[0], together[0]) and torch.equal(again[2], together[2])
    assert not torch.allclose(again[1], together[1], atol=1e-4)


@pytest.mark.parametrize("variant", ["sd1", "sd3"])
def test_gradient_checkpointing_keeps_the_users_of_its_batch(tiny_folder: Folders, variant: str) -> None:
    """The backward pass recomputes after the reference was asked for nobody."""
    gradients = []
    for checkpointing in (False, True):
        family = load_family(variant, tiny_folder(variant), gradient_checkpointing=checkpointing)
        network = family.network.requires_grad_(False).train()
        adapter = attach(network, AdapterSettings(rows=ROWS, dim=DIM), seed=3)
        spoil(adapter)
        noisy, t, cond = inputs(family)
        out = family.predict(network, noisy, t, cond.with_user(users(3)))
        with torch.no_grad():
            family.predict(network, noisy, t, cond)
        out.square().mean().backward()
        gradients.append({name: value.grad.clone() for name, value in adapter.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("variant", ["sd1", "sd3"])
def test_lora_and_users_together(tiny_family: Families, variant: str) -> None:
    """Each does what it does alone, and what the user adds uses the query that LoRA changed."""
    family = tiny_family(variant)
    network = copy.deepcopy(family.network)
    attach_lora(network, rank=2, alpha=2.0, targets=family.lora_targets["attention"], seed=1)
    spoil(attach(network, AdapterSettings(rows=ROWS, dim=DIM), seed=3))
    wanting = [name for name, value in network.named_parameters() if value.requires_grad]
    assert {name.startswith("user_adapter.") or "lora_" in name for name in wanting} == {True}
    torch.testing.assert_close(predict(family, network), predict(family, plain(family)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        predict(family, network, users(3)), predict(family, personal(family), users(3)), atol=1e-5, rtol=1e-4
    )
    before = predict(family, network, users(3)) - predict(family, network)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "to_q.lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(2))
    after = predict(family, network, users(3)) - predict(family, network)
    assert not torch.allclose(before, after, atol=1e-4)


def test_half_precision_with_and_without_the_adapter(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    for all_of_it in (False, True):
        network = plain(family).to(torch.bfloat16)
        spoil(attach(network, AdapterSettings(rows=ROWS, dim=DIM), seed=3))
        if all_of_it:
            network.to(torch.bfloat16)
        noisy, t, cond = inputs(family)
        with torch.no_grad():
            found = family.predict(network, noisy.bfloat16(), t, cond.map(torch.Tensor.bfloat16).with_user(users(3)))
        expected = predict(family, personal(family), users(3))
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=0.2, rtol=0.1)


def test_a_network_without_users_does_not_know_the_word(tiny_family: Families) -> None:
    for variant in ("sd1", "sd3", "flux"):
        with pytest.raises(TypeError, match="user"):
            predict(tiny_family(variant), tiny_family(variant).network, users(3))
    with pytest.raises(ModelError, match="no place in a FluxTransformer2DModel; it fits UNet2DConditionModel"):
        attach(copy.deepcopy(tiny_family("flux").network), AdapterSettings(rows=1, dim=2))


def test_what_does_not_fit_is_refused(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    network = personal(family)
    with pytest.raises(ModelError, match=r"must be \[batch, users, 2, 6\], got \[3, 1, 2, 5\]; they come from another encoder"):
        predict(family, network, torch.zeros(3, 1, 2, 5))
    with pytest.raises(ModelError, match="weights of the users"):
        predict(family, network, users(3), torch.ones(3))
    with pytest.raises(ModelError, match="no table"):
        predict(family, network, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ModelError, match="already carries"):
        attach(network, AdapterSettings(rows=1, dim=2))
    network.set_attn_processor(copy.deepcopy(family.network.attn_processors[next(iter(family.network.attn_processors))]))  # type: ignore[operator, arg-type]
    with pytest.raises(ModelError, match=r"attention processor of '.*attn2' was replaced"):
        predict(family, network)


def test_an_own_table_and_mixtures_of_prototypes(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    network = personal(family, users=4)
    adapter = adapter_of(network)
    assert adapter is not None
    places = torch.tensor([[2], [0], [2]])
    torch.testing.assert_close(predict(family, network, places), predict(family, network, adapter.table.detach()[places]))
    mixed = adapter_of(personal(family, users=4, prototypes=3))
    assert mixed is not None
    with torch.no_grad():
        mixed.logits[1] = torch.tensor([0.0, 0.0, 100.0])
        mixed.logits[2] = torch.tensor([5.0, 5.0, 5.0])
    torch.testing.assert_close(mixed.embeddings(torch.tensor(1)), mixed.prototypes[2])
    torch.testing.assert_close(mixed.embeddings(torch.tensor(2)), mixed.prototypes.mean(0))


# Files


@every_variant
def test_saved_and_loaded_again(tiny_family: Families, tmp_path: Path, variant: str) -> None:
    family = tiny_family(variant)
    network = personal(family)
    path = save(network, tmp_path)
    again = plain(family)
    load(again, tmp_path)
    assert torch.equal(predict(family, again, users(3)), predict(family, network, users(3)))
    assert path.stat().st_size < sum(value.numel() * 4 for value in network.parameters())
    load(copy.deepcopy(family.network), path)


def test_files_that_are_no_adapter_are_refused(tiny_family: Families, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    sd1, sd3 = tiny_family("sd1"), tiny_family("sd3")
    with pytest.raises(ModelError, match="no user adapter there"):
        load(copy.deepcopy(sd1.network), tmp_path)
    path = save(personal(sd3), tmp_path)
    with pytest.raises(ModelError, match="made for a SD3Transformer2DModel, this is a UNet2DConditionModel"):
        load(copy.deepcopy(sd1.network), path)
    save(personal(sd1), tmp_path / "sd1")
    with pytest.raises(ModelError, match="does not fit"):
        load(copy.deepcopy(tiny_family("sdxl").network), tmp_path / "sd1")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        load(copy.deepcopy(sd3.network), path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="not a user adapter of mmalign"):
        load(copy.deepcopy(sd3.network), path)


def test_saving_the_network_alone_is_refused_and_detaching_restores_it(tiny_family: Families, tmp_path: Path) -> None:
    family = tiny_family("sd1")
    network: Any = personal(family)
    with pytest.raises(ModelError, match="which save_pretrained would lose"):
        network.save_pretrained(tmp_path)
    before = predict(family, network, users(3))
    with detached(network):
        assert set(network.state_dict()) == set(family.network.state_dict())
        assert torch.equal(predict(family, network), predict(family, plain(family)))
        network.save_pretrained(tmp_path)
    assert torch.equal(predict(family, network, users(3)), before)
    assert len(sites(network)) == len([name for name in network.state_dict() if name.endswith("to_k_user.weight")])


# Mixtures


def blended(family: DiffusionFamily, network: nn.Module, mixtures: Any, *, doubled: bool = False, **words: Any) -> Tensor:
    noisy, t, cond = inputs(family, len(mixtures))
    if doubled:
        noisy, t, cond = noisy.repeat(2, 1, 1, 1), t.repeat(2), cond.repeat(2)
    with torch.no_grad(), made_for(network, persons(mixtures, **words)):
        return family.predict(network, noisy, t, cond)


@pytest.mark.parametrize("variant", ["sd1", "sd3"])
def test_mixtures_mean_what_they_say(tiny_family: Families, variant: str) -> None:
    family = tiny_family(variant)
    network = personal(family)
    a, b = users(1)[0, 0], users(1, seed=1)[0, 0]
    alone_a, alone_b, base = (predict(family, network, user, rows=2) for user in
                              (a.expand(2, 1, -1, -1), b.expand(2, 1, -1, -1), None))  # fmt: skip
    for mode in ("embedding", "attention", "prediction"):
        whole = blended(family, network, [[(a, 1.0)], [(b, 1.0)]], mode=mode)
        torch.testing.assert_close(whole, torch.stack([alone_a[0], alone_b[1]]), atol=1e-6, rtol=1e-5)
        same = blended(family, network, [[(a, 0.4), (a, 0.6)]] * 2, mode=mode)
        torch.testing.assert_close(same, alone_a, atol=1e-5, rtol=1e-4)
        nobody = blended(family, network, [[(a, 0.4), (b, 0.6)], []], mode=mode)
        torch.testing.assert_close(nobody[1], base[1], atol=1e-6, rtol=1e-6)
    affine = blended(family, network, [[(a, 0.3), (b, 0.7)]] * 2)
    torch.testing.assert_close(affine, 0.3 * alone_a + 0.7 * alone_b, atol=1e-5, rtol=1e-4)
    pushed = blended(family, network, [[(a, 1.0)]] * 2, guidance=2.5)
    torch.testing.assert_close(pushed, base + 2.5 * (alone_a - base), atol=1e-5, rtol=1e-4)
    assert torch.equal(blended(family, network, [[(a, 1.0)]] * 2, guidance=0.0), base)
    assert torch.equal(blended(family, network, [[(a, 1.0)]] * 2, scale=0.0), base)
    half = blended(family, network, [[(a, 1.0)], [(a, 1.0)]], scale=[0.0, 1.0])
    assert torch.equal(half[0], base[0]) and torch.allclose(half[1], alone_a[1], atol=1e-6)


def test_the_unprompted_rows_of_guidance_are_for_nobody(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    network = personal(family)
    a, b = users(1)[0, 0], users(1, seed=1)[0, 0]
    found = blended(family, network, [[(a, 1.0)], [(b, 1.0)]], doubled=True)
    base = predict(family, network, rows=2)
    torch.testing.assert_close(found[:2], base, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[2:], blended(family, network, [[(a, 1.0)], [(b, 1.0)]]), atol=1e-6, rtol=1e-6)


def test_mixtures_without_meaning_are_refused(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    network = personal(family)
    a = users(1)[0, 0]
    for words, mixtures, message in (
        ({}, [[(a, 0.5)]], "weights of a mixture must sum to 1"), ({}, [[]], "no row has a user"),
        ({"mode": "mean"}, [[(a, 1.0)]], "mode 'mean' is not one of"),
        ({"scale": [1.0, 1.0]}, [[(a, 1.0)]], "2 user scales for 1 rows"),
        ({}, [[(a, 1.0)], [(a[:1], 1.0)]], "must be alike"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=message):
            persons(mixtures, **words)  # type: ignore[arg-type]
    noisy, t, cond = inputs(family, 3)
    with pytest.raises(ModelError, match="asked for 3 rows where 1 pictures"), made_for(network, persons([[(a, 1.0)]])):
        family.predict(network, noisy, t, cond)
    with pytest.raises(ModelError, match="carries no user adapter"), made_for(family.network, persons([[(a, 1.0)]])):
        pass
    assert "forward" not in vars(network)
