"""The sides: TRL's DPOTrainer (its own loader, collator, loss and backward pass), two whole sequences by hand, and ours.

All are driven by the same bare loop: next batch with all its CPU work, loss, backward, clip to norm 1, AdamW. That is a
little kinder to TRL than its own loop, which also logs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vlm_models import trl_rows

from mmalign.branches import BranchBatch, BranchRecord, VisionFeatures
from mmalign.models.adapters import adapters_off, attach_lora, lora_state
from mmalign.models.reference import AdapterOffReference
from mmalign.models.stored_answers import StoredAnswers
from mmalign.models.vlm import VLM_FAMILIES
from mmalign.models.vlm.base import VlmConfig, VlmFamily
from mmalign.models.vlm.loading import cast_weights
from mmalign.trainers.base import Parts
from mmalign.trainers.vlm_dpo import VlmDPO, VlmDPOConfig
from mmalign.types import StepContext

RANK = 16
LEARNING_RATE = 1e-4


class Side:
    """Steps one after the other; what a side must give is `step`."""

    def __init__(self, pairs_per_step: int, device: torch.device) -> None:
        self.pairs_per_step = pairs_per_step
        self.device = device
        self.cpu: list[float] = []
        """CPU seconds per step, of every step made."""

    def step(self) -> float:
        raise AssertionError("a side defines its step")

    def run(self, seconds: float) -> float:
        """Pairs per second of wall time over at least `seconds`, one step at least."""
        steps, begin = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - begin < seconds:
            used = time.process_time()
            self.step()
            self.cpu.append(time.process_time() - used)
            steps += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return steps * self.pairs_per_step / (time.perf_counter() - begin)


class Ours(Side):
    """`VlmDPO` on the family's own batches.

    Args:
        source: a model's folder, or a loaded family whose network this side takes for itself.
        cached: reference log-probabilities and vision features are stored beforehand.
        ahead: make all batches beforehand and leave them on the device, so that the step alone is timed.
    """

    def __init__(
        self, source: Path | VlmFamily, records: Sequence[BranchRecord], batch: int, device: torch.device, *, dtype: str,
        checkpointing: bool, cached: bool = False, objective: Mapping[str, Any] | None = None, optimise: bool = True,
        lr: float = LEARNING_RATE, attention: str = "sdpa", template_only: bool = False,
        ahead: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(batch, device)
        settings = {"path": str(source), "dtype": dtype, "gradient_checkpointing": checkpointing,
                    "attention": attention, "template_only": template_only}  # fmt: skip
        self.family: VlmFamily = source if isinstance(source, VlmFamily) else VLM_FAMILIES.get("vlm").load(  # type: ignore[attr-defined]
            VlmConfig(**settings), device=device
        )  # fmt: skip
        if self.family.dtype != torch.float32:
            cast_weights(self.family.network, self.family.dtype)
        targets = self.family.lora_targets["language"]
        self.policy = attach_lora(self.family.network, rank=RANK, alpha=2 * RANK, targets=targets, seed=1).train()
        parts = Parts(family=self.family, policy=self.policy, reference=AdapterOffReference(self.policy), steps=1)
        self.trainer = VlmDPO.build(VlmDPOConfig(**{"objective": "dpo", "beta": 0.1, **(objective or {})}), parts)
        if cached:
            self._store(records)
        trained = [value for value in self.policy.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        self.batches = self._batches(records, batch)
        if ahead:
            made = itertools.islice(self.batches, len(records) // batch)
            self.batches = itertools.cycle([item.to(device) for item in made])
        self.optimise = optimise
        self.metrics: dict[str, float] = {}
        self.count = 0

    def _batches(self, records: Sequence[BranchRecord], batch: int) -> Iterator[BranchBatch]:
        starts = range(0, len(records) - batch + 1, batch)
        for start in itertools.cycle(starts):
            yield self.family.collate([self.family.encode(item) for item in records[start : start + batch]])

    def _store(self, records: Sequence[BranchRecord]) -> None:
        sums: dict[str, Sequence[float]] = {}
        features: dict[str, Tensor] = {}
        for record in records:
            batch = self.family.collate([self.family.encode(record)]).to(self.device)
            with torch.no_grad():
                vision = self.family.vision_features(self.policy, batch)
            assert self.trainer.reference is not None
            found = self.trainer.reference(lambda m, b=batch, v=vision: self.family.log_probs(m, b, vision=v).sum)  # type: ignore[misc]
            sums[record.id] = found.tolist()
            features |= dict(zip(batch.media.image_digests, vision.image, strict=True))
        self.trainer.reference = StoredAnswers(sums)
        self.trainer.features = Kept(features)

    def step(self) -> float:
        context = StepContext(step=self.count, seed=0, device=self.device)
        out = self.trainer.training_step(next(self.batches), context)
        out.loss.backward()
        trained = [value for value in self.policy.parameters() if value.requires_grad]
        nn.utils.clip_grad_norm_(trained, 1.0)
        if self.optimise:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.count += 1
        self.metrics = {name: float(value) for name, value in out.metrics.items()}
        return float(out.loss.detach())


class Kept:
    """Features held in memory in the manner of the store on disk."""

    def __init__(self, features: Mapping[str, Tensor]) -> None:
        self.features = features

    def of(self, batch: BranchBatch) -> VisionFeatures:
        return VisionFeatures(image=tuple(self.features[digest] for digest in batch.media.image_digests))


class Trl(Side):
    """TRL's DPOTrainer with the same adapter, from the same start.

    Args:
        source: a model's folder, or the network and its processor.
        ahead: as of `Ours`.
    """

    def __init__(
        self, source: Path | tuple[nn.Module, Any], records: Sequence[BranchRecord], batch: int, device: torch.device, *,
        dtype: str, checkpointing: bool, start: nn.Module, targets: Sequence[str], scratch: Path,
        objective: Mapping[str, Any] | None = None, optimise: bool = True, lr: float = LEARNING_RATE,
        ahead: bool = False,
    ) -> None:  # fmt: skip
        from datasets import Dataset
        from peft import LoraConfig, set_peft_model_state_dict
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from trl import DPOConfig, DPOTrainer

        super().__init__(batch, device)
        precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        if isinstance(source, Path):
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=precision)
            processor = AutoProcessor.from_pretrained(source)
        else:
            model, processor = source
        adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(targets), lora_dropout=0.0)
        config = DPOConfig(
            output_dir=str(scratch), per_device_train_batch_size=batch, max_length=None, report_to="none",
            gradient_checkpointing=checkpointing, learning_rate=lr, weight_decay=0.0, lr_scheduler_type="constant",
            bf16=dtype == "bf16", use_cpu=device.type == "cpu", remove_unused_columns=False, dataloader_num_workers=0,
            gradient_checkpointing_kwargs={"use_reentrant": False}, disable_tqdm=True,
            **{"loss_type": ["sigmoid"], "beta": 0.1, **(objective or {})},
        )  # fmt: skip
        self.trainer = DPOTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(trl_rows(records)),
            processing_class=processor, peft_config=adapter,
        )  # fmt: skip
        state = {f"base_model.model.{name}": value for name, value in lora_state(start).items()}
        set_peft_model_state_dict(self.trainer.model, state)
        if checkpointing:  # its own loop switches this on when it starts, which this bare loop does not do
            whole: Any = self.trainer.model
            enable = getattr(whole, "activation_checkpointing_enable", whole.gradient_checkpointing_enable)
            enable(config.gradient_checkpointing_kwargs)
        self.model = self.trainer.accelerator.prepare(self.trainer.model).train()
        self.trainer.current_gradient_accumulation_steps = 1  # what its own loop sets
        self.trained = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0)
        self.rows = trl_rows(records)
        self.optimise = optimise
        self.batches = self._batches(batch)
        if ahead:
            made = itertools.islice(self.batches, len(records) // batch)
            self.batches = itertools.cycle([{name: value.to(device) for name, value in item.items()} for item in made])

    def _batches(self, batch: int) -> Iterator[dict[str, Any]]:
        """TRL's collator on rows in order: its sampler would shuffle them its own way."""
        collator = self.trainer.data_collator
        for start in itertools.cycle(range(0, len(self.rows) - batch + 1, batch)):
            yield collator([dict(row) for row in self.rows[start : start + batch]])

    def step(self) -> float:
        loss = self.trainer.training_step(self.model, next(self.batches))
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        if self.optimise:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss)

    def metric(self, name: str) -> float:
        """The last value of a metric of the trainer."""
        return float(self.trainer._metrics["train"][name][-1])

    @property
    def gradients(self) -> list[Tensor]:
        return [value.grad for value in self.trained if value.grad is not None]


def shift(policy: nn.Module) -> None:
    """Move the adapter a little, the same way on every side: at the start every loss is log 2, whatever one computes."""
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in policy.named_parameters():
            if "lora_B" in name:
                value.copy_(0.002 * torch.randn(value.shape, generator=stream).to(value.device))


class TwoSequences(Side):
    """What one would write by hand: two whole sequences, pixels with each, adapters off for the reference."""

    def __init__(self, family: VlmFamily, network: nn.Module, records: Sequence[BranchRecord], device: torch.device) -> None:
        super().__init__(1, device)
        targets = family.lora_targets["language"]
        self.policy: Any = attach_lora(network, rank=RANK, alpha=2 * RANK, targets=targets, seed=1).train()
        shift(self.policy)
        self.dtype = family.dtype
        self.batches = [self._batch(family, record) for record in records]
        self.trained = [value for value in self.policy.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0)
        self.count = 0

    def _batch(self, family: VlmFamily, record: BranchRecord) -> dict[str, Any]:
        (row,) = family.encode(record).rows
        width = len(row.prefix) + max(map(len, row.branches))
        ids, mask = torch.full((2, width), family.tokenizer.pad_token_id), torch.zeros(2, width, dtype=torch.int64)
        for number, branch in enumerate(row.branches):
            length = len(row.prefix) + len(branch)
            ids[number, :length], mask[number, :length] = torch.cat([row.prefix, branch]), 1
        media: dict[str, Tensor] = {}
        for unit in row.units:
            media = {name: torch.cat([value, value]) if name == "pixel_values" else torch.stack([value, value])
                     for name, value in unit.tensors.items()}  # fmt: skip
        made = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": family.token_types(ids), **media}
        keep = torch.arange(len(row.prefix) - 1, width - 1)
        answers = mask[:, len(row.prefix) :].bool()
        return {"inputs": {name: value.to(self.device) for name, value in made.items()}, "keep": keep.to(self.device),
                "target": ids[:, len(row.prefix) :].to(self.device), "answers": answers.to(self.device)}  # fmt: skip

    def _scores(self, batch: dict[str, Any]) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            logits = self.policy(**batch["inputs"], use_cache=False, logits_to_keep=batch["keep"]).logits
        found = logits.float().log_softmax(-1).gather(-1, batch["target"][..., None])[..., 0]
        total: Tensor = (found * batch["answers"]).sum(-1)
        return total

    def step(self) -> float:
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        with torch.no_grad(), adapters_off(self.policy):
            reference = self._scores(batch)
        gain = self._scores(batch) - reference
        loss = -nn.functional.logsigmoid(0.1 * (gain[0] - gain[1]))
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())
