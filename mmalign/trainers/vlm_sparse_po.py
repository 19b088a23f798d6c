"""SparsePO (arXiv:2410.05102): which tokens carry the preference, and which may leave the reference, is learnt with it.

Every token of both answers has two weights, one on its log-ratio and one on its divergence KL(reference | policy) over the
whole vocabulary. They are made from the reference's hidden states of all layers: one scalar a layer,
``relu(w_l . LN(h_l) + b_l)``, mixed by ``relu(sum_l v_l s_l + c)`` (the form of huawei-noah/HEBO: SparsePO), and pulled to zero
by their 1-norms. Choices of ours:

- The normalisation has no weights, and all weights start at 1: ``w = 0, b = 1, v = 1 / layers, c = 0``. So the first step is DPO
  with the divergence term, which is zero there.
- Weights are trained with the policy by the same optimiser and rate, kept in checkpoints, and not exported: a model answers
  without them. On several processes their gradients are averaged as the policy's are.

A stored reference cannot be used: layers and whole distributions are needed. The authors use beta 0.8 on short, 0.1 on long
answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.branches import BranchBatch
from mmalign.config import Section
from mmalign.models.vlm.states import AnswerStates, answer_states
from mmalign.objectives import get_objective
from mmalign.objectives.divergence import token_divergence
from mmalign.objectives.reduce import weighted_mean
from mmalign.objectives.tokens import MaskedTokens
from mmalign.trainers.answers import AnswerTrainer, vision_features
from mmalign.trainers.base import Parts, Stateful
from mmalign.types import PairScores, StepContext, StepOutput


class VlmSparsePOConfig(Section):
    """Settings of SparsePO."""

    name: str = "vlm_sparse_po"
    beta: float = 0.1
    """Strength of the pull to the reference."""
    masks: Literal["common", "independent"] = "common"
    """One weight a token for log-ratio and divergence, or one for each."""
    reward_weight: float = 1e-3
    """Of the 1-norm of the log-ratios' weights."""
    kl_weight: float = 1e-3
    """Of the 1-norm of the divergences' weights."""
    prefix: Literal["shared", "plain"] = "shared"
    """One row per prompt with both answers behind it, or one row per answer; equal results."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if self.beta <= 0 or self.reward_weight < 0 or self.kl_weight < 0:
            raise ValueError("beta must be positive, reward_weight and kl_weight not negative")


class TokenMasks(nn.Module):
    """A weight for every token from the reference's layers."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.zeros(layers, width))
        self.offset = nn.Parameter(torch.ones(layers))
        self.mix = nn.Parameter(torch.full((layers,), 1.0 / layers))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, states: Tensor) -> Tensor:
        """``[layers, N, D]`` to ``[N]`` float32, at least 0."""
        normal = F.layer_norm(states.float(), states.shape[-1:])
        each = F.relu((normal * self.direction[:, None]).sum(-1) + self.offset[:, None])
        return F.relu((each * self.mix[:, None]).sum(0) + self.shift)


class VlmSparsePO(AnswerTrainer):
    """See the module's head."""

    Config = VlmSparsePOConfig
    batches: ClassVar[str] = "vlm_pairs"

    def __init__(self, config: VlmSparsePOConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        text = parts.family.text_config
        count = 1 if config.masks == "common" else 2
        self.masks = nn.ModuleList(TokenMasks(text.num_hidden_layers, text.hidden_size) for _ in range(count))
        self.masks.to(parts.family.device)
        for value in self.masks.parameters():
            value.register_hook(_averaged)

    def parameter_groups(self) -> Mapping[str, Sequence[Tensor]]:
        return {"main": [*super().parameter_groups()["main"], *self.masks.parameters()]}

    def extra_state(self) -> Mapping[str, Stateful]:
        return {"masks": self.masks}  # type: ignore[dict-item]  # its load_state_dict says more

    def training_step(self, batch: BranchBatch, ctx: StepContext) -> StepOutput:
        config, batch = self.config, batch.to(ctx.device)
        vision = vision_features(self.family, self.policy, batch, self.features)
        policy = answer_states(self.family, self.policy, batch, prefix=config.prefix, vision=vision)
        reference = self._ask_reference(batch, vision)
        logps, start, kl = token_divergence(
            policy.hidden, reference.hidden, policy.target, head=self._head(policy), reference_head=self._head(reference)
        )
        assert reference.layers is not None
        weights = [mask(reference.layers) for mask in self.masks]
        present = policy.table(torch.ones_like(logps), batch)
        tables = [policy.table(values, batch) for values in (logps, start, kl, weights[0], weights[-1])]
        sides = [
            MaskedTokens(policy=a, reference=b, kl=c, reward_mask=d, kl_mask=e, present=f)
            for a, b, c, d, e, f in zip(*(batch.pair(table) for table in (*tables, present)), strict=True)
        ]
        losses = get_objective("sparse_po")(
            sides[0], rejected=sides[1], beta=config.beta, reward_weight=config.reward_weight, kl_weight=config.kl_weight
        )
        return self._output(losses, tables, present, batch)

    def _head(self, states: AnswerStates) -> Any:
        def logits(hidden: Tensor) -> Tensor:
            with self.family.autocast():
                return torch.as_tensor(states.head(hidden))

        return logits

    def _ask_reference(self, batch: BranchBatch, vision: Any) -> AnswerStates:
        kept: list[AnswerStates] = []

        def ask(module: nn.Module) -> Tensor:
            kept.append(answer_states(self.family, module, batch, prefix=self.config.prefix, vision=vision, layers=True))
            return kept[0].hidden

        self.reference(ask)
        return kept[0]

    def _output(self, losses: Tensor, tables: list[Tensor], present: Tensor, batch: BranchBatch) -> StepOutput:
        weight = batch.weight
        sums = [batch.pair(table.sum(1)) for table in tables[:2]]
        length = batch.pair(present.sum(1))
        scores = PairScores(
            policy_chosen=sums[0][0], policy_rejected=sums[0][1], reference_chosen=sums[1][0], reference_rejected=sums[1][1],
            chosen_length=length[0], rejected_length=length[1],
        )  # fmt: skip
        answers, tokens = weight[batch.record], present.sum(1).clamp_min(1)
        metrics = {}
        for name, table in (("mask_reward", tables[3]), ("mask_kl", tables[4]), ("kl_per_token", tables[2])):
            metrics[name] = weighted_mean((table.detach() * present).sum(1) / tokens, answers)
        silent = ((tables[3].detach() == 0) & (present > 0)).sum(1) / tokens
        metrics["mask_zero"] = weighted_mean(silent, answers)
        return self.pair_output(losses, scores, weight, metrics=metrics)


def _averaged(gradient: Tensor) -> Tensor:
    """A gradient over all processes: nothing wraps these weights."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient)
        gradient /= torch.distributed.get_world_size()
    return gradient
