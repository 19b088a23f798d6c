"""Online and mixed DPO of a vision-language model (arXiv:2407.02477): pairs from the current policy, ordered by a judge.

For every prompt of a step the policy answers several times; the judge's best and worst answer are the pair. With probability
`offline` a row keeps the pair of its table instead (Mixed-DPO, where the paper takes one half), drawn for each row. Choices where
the paper is silent, in plain words:

- Answers are drawn at temperature 1 from the whole distribution.
- Where the judge ties, or cannot tell two answers apart, the row adds nothing to the step: its loss is zero and it still counts
  in the mean, so that a judge that says little teaches little.
- The policy that answers is that of the step under way; nothing is stored and used later. Every draw is a function of seed, step,
  row and number, so a resumed run answers as the straight one did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmalign import rng
from mmalign.branches import Answer, BranchRecord
from mmalign.config import Section
from mmalign.models.vlm.vllm_engine import VllmGenerator, VllmOptions
from mmalign.objectives.reduce import weighted_mean
from mmalign.rewards.answers import load_judge
from mmalign.rewards.preference import PreferenceJudge
from mmalign.trainers.base import Parts
from mmalign.trainers.choices import NOTHING, Choice, ChosenPairs
from mmalign.trainers.vlm_dpo import VlmDPOConfig
from mmalign.types import StepContext


class VlmOnlineDPOConfig(VlmDPOConfig):
    """Settings of online and mixed DPO; those of `vlm_dpo`, and how answers are made and judged."""

    name: str = "vlm_online_dpo"
    judge: str
    """Who orders answers: a name of `mmalign.rewards.answers.ANSWER_JUDGES`, package.module:Class, or a model's as
    prefer:<folder or hub id> and prefer-api:<url>#<model>."""
    judge_options: dict[str, Any] = Field(default_factory=dict)
    """How a model's judge is asked: `mmalign.rewards.preference.PreferenceOptions`."""
    offline: float = 0.0
    """Probability that a row keeps the pair of its table, in [0, 1); 0.5 is Mixed-DPO. Needs a table of pairs."""
    samples: int = 2
    """Answers per prompt; the judge's best and worst are the pair."""
    min_gap: float = 0.0
    """Judged difference below or at which a row adds nothing."""
    temperature: float = 1.0
    """Of the answers made; must be positive, or all answers to a prompt are one."""
    top_p: float = 1.0
    """Share of the probability that is sampled from, most likely tokens first."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    generation_batch: int = 16
    """Answers made at a time."""
    generator: Literal["transformers", "vllm"] = "transformers"
    """Who runs the policy that answers: the trained network itself, or vLLM with the adapter of every step (extra `vllm`)."""
    vllm: VllmOptions = Field(default_factory=VllmOptions)
    """What vLLM may use, where it generates."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        super().model_post_init(context)
        if not 0 <= self.offline < 1:
            raise ValueError(f"offline must be in [0, 1), got {self.offline}; method 'vlm_dpo' trains on the table alone")
        if self.samples < 2 or self.min_gap < 0 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("samples must be at least 2, min_gap not negative, temperature positive and top_p in (0, 1]")
        if self.max_new_tokens < 1 or self.generation_batch < 1:
            raise ValueError("max_new_tokens and generation_batch must be at least 1")
        if self.objective in ("ld_dpo", "modpo") or self.soft_labels:
            raise ValueError("ld_dpo, modpo and soft_labels read what generated answers do not have; use another objective")


class VlmOnlineDPO(ChosenPairs):
    """See the module's head."""

    Config: ClassVar[type[Section]] = VlmOnlineDPOConfig
    SOURCES: ClassVar[tuple[str, ...]] = ("online", "offline", "tied")

    def __init__(self, config: VlmOnlineDPOConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.judge = load_judge(config.judge, config.judge_options)
        self.engine = VllmGenerator(parts.family, config.vllm) if config.generator == "vllm" else None

    def choose(self, records: Sequence[BranchRecord], ctx: StepContext) -> list[Choice]:
        """The pair of every row: the table's own, or the judge's best and worst of fresh answers."""
        if isinstance(self.judge, PreferenceJudge):
            self.judge.restart()
        drawn = rng.uniform([record.id for record in records], seed=ctx.seed, purpose="offline", step=ctx.step).tolist()
        online = [number for number, value in enumerate(drawn) if value >= self.config.offline]
        found = dict(zip(online, self._answer([records[number] for number in online], ctx), strict=True))
        return [
            found[number] if number in found else Choice(record=record, source="offline", said=self._said(None, (), ()))
            for number, record in enumerate(records)
        ]

    def _answer(self, records: Sequence[BranchRecord], ctx: StepContext) -> list[Choice]:
        """Fresh answers to every record, judged."""
        if not records:
            return []
        config = self.config
        how: dict[str, Any] = {
            "max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "top_p": config.top_p,
            "seed": ctx.seed, "step": ctx.step, "samples": config.samples,
        }  # fmt: skip
        if self.engine is not None:
            answers = self.engine.generate(self.policy, records, **how)
        else:
            examples = [self.family.encode(record, training=False) for record in records]
            answers = self.family.generate(self.policy, examples, batch_size=config.generation_batch, **how)
        flat = [(record, text) for record, texts in zip(records, answers, strict=True) for text in texts]
        scores = self.judge.score([record for record, _ in flat], [text for _, text in flat])
        made = []
        for number, (record, texts) in enumerate(zip(records, answers, strict=True)):
            said = scores[number * config.samples : (number + 1) * config.samples]
            made.append(self._pair(record, texts, said))
        return made

    def _pair(self, record: BranchRecord, texts: Sequence[str], scores: Sequence[float | None]) -> Choice:
        """Best against worst of what could be judged and says something; the first of equals."""
        known = [(score, text) for score, text in zip(scores, texts, strict=True) if score is not None and text.strip()]
        nothing = (0.0, NOTHING.text)
        best, worst = (max(known, key=_first), min(known, key=_first)) if known else (nothing, nothing)
        told = best[0] - worst[0] > self.config.min_gap
        pair = (Answer(text=best[1]), Answer(text=worst[1])) if told else (NOTHING, NOTHING)
        return Choice(
            record=replace(record, answers=pair, p_chosen=1.0), source="online" if told else "tied", counts=told,
            said=self._said(self.config.judge, texts, scores),
        )  # fmt: skip

    @staticmethod
    def _said(judge: str | None, texts: Sequence[str], scores: Sequence[float | None]) -> dict[str, Any]:
        return {"judge": judge, "answers": list(texts), "scores": list(scores)}

    def measures(self, choices: Sequence[Choice], weight: Tensor) -> dict[str, Tensor]:
        """The judge's mean over answers, 0 for rows without answers; of a model as judge, how it did in this step."""
        means = []
        for choice in choices:
            known = [score for score in choice.said["scores"] if score is not None]
            means.append(sum(known) / len(known) if known else 0.0)
        found = {"judge_score": weighted_mean(torch.tensor(means, device=weight.device), weight)}
        if isinstance(self.judge, PreferenceJudge):
            found |= {name: torch.tensor(value, device=weight.device) for name, value in self.judge.figures().items()}
        return found


def _first(item: tuple[float, str]) -> float:
    return item[0]
