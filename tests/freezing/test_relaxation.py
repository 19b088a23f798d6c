"""Projection, hard ratios, baselines, and the masked network's gradients by hand-worked numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmalign.errors import ConfigError
from mmalign.freezing.baselines import TOLERANCE, attention_scores, matched_random, random_scores
from mmalign.freezing.masked import GradientMeter, MaskedNetwork, MaskOptimizer
from mmalign.freezing.relaxation import chance_jaccard, jaccard, mean_jaccard, project_mean, tangent, top_names
from tests.freezing.conftest import Small


def test_the_projected_mean_is_exact_and_the_order_stays() -> None:
    scores = torch.tensor([3.0, -1.0, 0.2, 0.1, -40.0])
    for ratio in (0.05, 0.3, 0.5, 0.97):
        found = project_mean(scores, ratio, temperature=0.2)
        assert found.mean().item() == pytest.approx(ratio, abs=1e-6)
        assert (found[scores.argsort()].diff() >= 0).all()
        torch.testing.assert_close(project_mean(scores + 7.5, ratio, temperature=0.2), found, atol=1e-5, rtol=0)
    weights = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])
    assert (weights * project_mean(scores, 0.4, temperature=0.2, weights=weights)).sum().item() == pytest.approx(0.4, abs=1e-6)
    assert project_mean(torch.zeros(4), 0.3, temperature=0.2).tolist() == pytest.approx([0.3] * 4)
    assert project_mean(scores, 0.0, temperature=0.2).tolist() == [0.0] * 5
    assert project_mean(scores, 1.0, temperature=0.2).tolist() == [1.0] * 5


def test_a_large_tensor_has_to_earn_its_size() -> None:
    scores, weights = torch.tensor([1.0, 0.8, -0.4]), torch.tensor([0.7, 0.2, 0.1])
    price = 3 * weights
    for ratio in (0.1, 0.5, 0.9):
        found = project_mean(scores, ratio, temperature=0.2, weights=weights)
        assert (weights * found).sum().item() == pytest.approx(ratio, abs=1e-6)
        # one price for all: (T logit(m_i) - x_i) / (N w_i) is the same number
        shifts = (0.2 * torch.logit(found.double()) - scores) / price
        assert (shifts - shifts[0]).abs().max().item() < 1e-3
        torch.testing.assert_close(
            project_mean(scores + 2.5 * price, ratio, temperature=0.2, weights=weights), found, atol=1e-5, rtol=0
        )
    # per parameter 1 / 2.1 against 0.8 / 0.6: the second is frozen first, though its score is lower
    hard = project_mean(scores, 0.2, temperature=1e-3, weights=weights)
    assert hard.tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-3)


def test_the_tangent_keeps_the_mean() -> None:
    assert tangent(torch.tensor([1.0, 2.0, 6.0])).tolist() == [-2.0, -1.0, 3.0]
    weights = torch.tensor([1.0, 2.0])
    # (1*1 + 2*2) / (1 + 4) = 1 times the weights is taken away
    assert tangent(torch.tensor([1.0, 2.0]), weights).tolist() == [0.0, 0.0]


def test_the_hard_ratio_is_met_to_one_tensor_whatever_the_order() -> None:
    scores = {f"t{index}": float(index % 3) for index in range(10)}  # many ties
    for ratio in (0.0, 0.1, 0.25, 0.5, 1.0):
        names = top_names(scores, ratio)
        assert len(names) == round(ratio * 10)
        assert names == top_names(dict(reversed(list(scores.items()))), ratio)
    assert top_names(scores, 0.2) == ("t2", "t5")  # the first by name of the three highest
    sizes = {"a": 60, "b": 30, "c": 10}
    ranked = {"a": 1.0, "b": 3.0, "c": 2.0}
    # b holds 30 %, b and c 40 %, all 100 %
    assert top_names(ranked, 0.34, sizes=sizes) == ("b",)
    assert top_names(ranked, 0.36, sizes=sizes) == ("b", "c")
    assert top_names(ranked, 0.8, sizes=sizes) == ("a", "b", "c")
    with pytest.raises(ConfigError, match="ratio must be in"):
        top_names(scores, 1.2)


def test_overlaps() -> None:
    assert jaccard(["a", "b"], ["b", "c"]) == pytest.approx(1 / 3)
    assert jaccard([], []) == 1.0
    assert mean_jaccard([["a"], ["a"], ["b"]]) == pytest.approx(1 / 3)
    assert chance_jaccard(0.3) == pytest.approx(0.3 / 1.7)


def test_matched_random_masks_hold_the_wanted_share() -> None:
    sizes = {f"t{index:02d}": (index + 1) ** 2 for index in range(60)}
    total = sum(sizes.values())
    seen = []
    for seed in range(3):
        names = matched_random(sizes, count=20, share=0.55, seed=seed)
        assert len(set(names)) == 20
        assert sum(sizes[name] for name in names) / total == pytest.approx(0.55, abs=TOLERANCE)
        seen.append(names)
    assert len(set(seen)) == 3
    assert matched_random(sizes, count=20, share=0.55, seed=0) == seen[0]
    with pytest.raises(ConfigError, match="no random mask of 1 tensors holds 90.0 %"):
        matched_random(sizes, count=1, share=0.9, seed=0)


def test_attention_goes_first_and_random_depends_on_seed_and_name() -> None:
    shapes = {"x.attn1.to_q.weight": (2, 2), "x.attn2.to_q.weight": (2, 2), "x.attn2.to_q.bias": (2,), "conv.weight": (2, 2)}
    assert top_names(attention_scores(shapes, seed=3), 0.25) == ("x.attn2.to_q.weight",)
    assert top_names(attention_scores(shapes, seed=3), 0.5) == ("x.attn1.to_q.weight", "x.attn2.to_q.weight")
    assert random_scores(["a", "b"], seed=1)["a"] == random_scores(["b", "a"], seed=1)["a"]
    assert random_scores(["a"], seed=1) != random_scores(["a"], seed=2)


class Scalar(nn.Module):
    """J = theta squared over two."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[value]]))

    def forward(self) -> torch.Tensor:
        return self.weight.square().sum() / 2


def test_the_gradients_of_one_scalar() -> None:
    # theta_pre = 1, D = 2, m = 0.25: theta = 2.5, dJ/dm = -D theta = -5, dJ/dD = (1 - m) theta = 1.875
    masked = MaskedNetwork(Scalar(1.0), ratio=0.25, temperature=0.2)
    with torch.no_grad():
        masked.displacement[0].fill_(2.0)
    value = masked()
    assert value.item() == pytest.approx(2.5**2 / 2)
    value.backward()
    assert masked.scores.grad is not None and masked.displacement[0].grad is not None
    assert masked.scores.grad.item() == pytest.approx(-5.0, rel=1e-5)  # straight through: no factor m(1 - m) / T
    assert masked.displacement[0].grad.item() == pytest.approx(1.875, rel=1e-5)
    assert masked.network.weight.grad is None


def test_full_and_empty_masks_are_the_ends(small: Small) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    base = small(x)
    masked = MaskedNetwork(small, ratio=1.0, temperature=0.2)
    with torch.no_grad():
        for value in masked.displacement:
            value.fill_(0.5)
    assert torch.equal(masked(x), base)
    masked.ratio = None
    moved = Small()
    moved.load_state_dict({name: value + 0.5 for name, value in small.state_dict().items()})
    torch.testing.assert_close(masked(x), moved(x), rtol=0, atol=0)
    masked.restart()
    assert torch.equal(masked(x), base)


def test_a_lora_user_is_masked_by_layer(small: Small) -> None:
    from mmalign.models.adapters import attach_lora

    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    base = small(x)
    attach_lora(small, rank=2, alpha=2.0, targets=["to_q", "to_k"])
    masked = MaskedNetwork(small, ratio=0.5, temperature=0.2)
    assert masked.names == ("to_k.weight", "to_q.weight")
    first = [value.detach().clone() for value in masked.user_parameters()]
    with torch.no_grad():
        for value in masked.user_parameters():
            value.add_(0.1)
    assert not torch.equal(masked(x), base)
    masked(x).sum().backward()
    assert masked.scores.grad is not None and (masked.scores.grad != 0).all()
    masked.ratio = 1.0
    torch.testing.assert_close(masked(x), base, rtol=0, atol=0)
    masked.restart()
    assert all(torch.equal(old, new) for old, new in zip(first, masked.user_parameters(), strict=True))


class Sum(nn.Module):
    """y = a x1 + b x2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a[0, 0] * x[:, 0] + self.b[0, 0] * x[:, 1]


@pytest.mark.parametrize("illegal", ["a", "b"])
@pytest.mark.parametrize("seed", range(3))
def test_the_known_answer(illegal: str, seed: int) -> None:
    """Illegal data move one tensor, innocent data the other: the first is frozen, whichever it is."""
    masked = MaskedNetwork(Sum(), ratio=0.5, temperature=0.2)
    mask = MaskOptimizer(masked.scores, masked.weights, rate=0.1, decay=0.9)
    user = torch.optim.AdamW(masked.displacement, lr=0.05, weight_decay=0.0)
    stream = torch.Generator().manual_seed(seed)
    column = {"illegal": "ab".index(illegal), "innocent": 1 - "ab".index(illegal)}
    for step in range(100):
        role = ("illegal", "innocent")[step // 10 % 2]
        x = torch.zeros(8, 2)
        x[:, column[role]] = torch.randn(8, generator=stream)
        (masked(x) - 3 * x.sum(1)).square().mean().backward()
        mask.role = role  # type: ignore[assignment]
        (mask if step % 5 == 4 else user).step()
        user.zero_grad()
        mask.zero_grad()
        if step % 10 == 9:
            masked.restart()
            user.state.clear()
    scores = dict(zip(masked.names, masked.scores.tolist(), strict=True))
    assert top_names(scores, 0.5) == (illegal,)
    assert masked.soft_mask()[masked.names.index(illegal)] > 0.95


def test_the_unit_of_a_user_is_fixed_before_the_mask_takes_a_side() -> None:
    scores = nn.Parameter(torch.zeros(2))
    mask = MaskOptimizer(scores, torch.tensor([0.5, 0.5]), rate=0.1, decay=0.0)

    def step(role: str, *costs: float) -> list[float]:
        mask.role = role  # type: ignore[assignment]
        scores.grad = torch.tensor(costs)
        mask.step()
        return scores.tolist()

    assert step("illegal", 3.0, 1.0) == [0.0, 0.0]  # unit 4
    # unit 2: (3/4, 1/4) - (1/2, 1/2), one size whatever its length
    assert step("innocent", 1.0, 1.0) == pytest.approx([0.1, -0.1])
    # a user who has nearly all he needs asks for little: (3/4, 1/4) - (1/5, 0); as shares it would be (3/4, 1/4) - (1, 0)
    assert step("innocent", 0.4, 0.0) == pytest.approx([0.2, -0.2])
    # one who is frozen out asks for more: (3/4, 1/4) - (4, 4/2)
    assert step("innocent", 8.0, 4.0) == pytest.approx([0.1, -0.1])


def test_scores_stay_until_both_users_have_settled() -> None:
    scores = nn.Parameter(torch.zeros(2))
    mask = MaskOptimizer(scores, torch.tensor([0.5, 0.5]), rate=0.1, decay=0.9, settle=2)
    seen = []
    for role, costs in (("illegal", (2.0, 0.0)), ("illegal", (0.0, 2.0)), ("innocent", (1.0, 0.0)), ("innocent", (3.0, 0.0))):
        mask.role = role  # type: ignore[assignment]
        scores.grad = torch.tensor(costs)
        mask.step()
        seen.append(scores.tolist())
    assert seen[:3] == [[0.0, 0.0]] * 3
    # illegal: the mean (1, 1) over its sum; innocent: (2, 0) over 2
    assert seen[3] == pytest.approx([-0.1, 0.1])


def test_the_meter_moves_nothing_and_averages_magnitudes() -> None:
    values = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.zeros(3))]
    meter = GradientMeter(values)
    for factor in (1.0, 3.0):
        values[0].grad = torch.tensor([1.0, -2.0]) * factor
        meter.step()
    assert meter.magnitudes() == [1.5 + 4.5, 0.0]
    assert values[0].tolist() == [1.0, 2.0]


def test_recomputed_activations_are_refused(small: Small) -> None:
    small.to_q.gradient_checkpointing = True  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        MaskedNetwork(small, ratio=0.5, temperature=0.2)
