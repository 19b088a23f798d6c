"""Answers from vLLM, which is faster for many long ones (`generator: vllm` of a method or a sampling, extra ``vllm``).

vLLM holds the starting weights. In training the adapter of the step under way is written to a scratch folder and sent along with
the questions, so that works with `tuning.name: lora` alone. Every answer has a seed of its own from (seed, step, row, number).
vLLM's kernels round otherwise than transformers' and may depend on what else is in a batch, so a resumed run need not answer
exactly as the straight one did: where that is wanted, leave `generator` at its default.

**Not run by its authors**: vLLM could not be installed beside the tested versions. It is written against the source of vLLM
0.33.0 (``LLM.generate`` with token prompts, ``multi_modal_data``, ``SamplingParams``, ``LoRARequest``).
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mmalign import rng
from mmalign.branches import BranchRecord
from mmalign.config import Section
from mmalign.errors import ConfigError, MissingExtraError
from mmalign.models.adapters import ADAPTER, is_lora, lora_state
from mmalign.models.vlm.encoding import conversation, opened, render, starts_itself
from mmalign.models.vlm.forward import inner
from mmalign.models.vlm.generation import text_of

if TYPE_CHECKING:
    from mmalign.models.vlm.base import VlmFamily

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FORBIDDEN = -100.0
"""Added to the logits of placeholders, as low as vLLM takes it."""


class VllmOptions(Section):
    """What vLLM may use."""

    gpu_memory_utilization: float = 0.4
    """Share of the GPU's memory for its weights and cache; training needs the rest."""
    max_model_len: int | None = None
    """Most tokens of a prompt with its answer; default: what the model allows."""
    enforce_eager: bool = False
    """No captured graphs: less memory, slower."""
    tensor_parallel_size: int = 1
    """GPUs that share the weights."""

    def model_post_init(self, context: Any) -> None:
        """Refuse settings without meaning."""
        if not 0 < self.gpu_memory_utilization < 1 or self.tensor_parallel_size < 1:
            raise ValueError("gpu_memory_utilization must be in (0, 1), and tensor_parallel_size at least 1")


class VllmGenerator:
    """vLLM around a family's starting weights; the engine starts with the first question.

    Args:
        adapters: whether every question comes with a policy's adapter; otherwise the starting weights answer.

    Raises:
        ConfigError: settings of the model that vLLM does not take over.
        MissingExtraError: vLLM is not installed.
    """

    def __init__(self, family: VlmFamily, options: VllmOptions, *, adapters: bool = True) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise MissingExtraError("vllm", "vllm", "generator: vllm")
        if family.config.image_splitting is not None:
            raise ConfigError("generator: vllm cuts pictures as the processor's own files say; remove model.image_splitting")
        self.family, self.options, self.adapters = family, options, adapters
        self._engine: Any = None
        self._scratch = Path(tempfile.mkdtemp(prefix="mmalign-vllm-"))
        self._sent = 0

    def generate(
        self, module: nn.Module | None, records: Sequence[BranchRecord], **how: Any
    ) -> list[list[str]]:
        """`samples` answers to every record's prompt, under the module's adapter where adapters are sent.

        Args:
            how: as ``answer``.

        Raises:
            ConfigError: the module has no adapter (vLLM holds the starting weights), or several processes train.
            VlmDataError: a prompt that cannot be rendered, or media that cannot be opened.
        """
        return self.answer(module, [(record.id, self.prompt(record)) for record in records], **how)

    def answer(
        self, module: nn.Module | None, asked: Sequence[tuple[str, dict[str, Any]]], *, max_new_tokens: int,
        temperature: float, top_p: float, seed: int, step: int = 0, samples: int = 1, repetition_penalty: float = 1.0,
    ) -> list[list[str]]:  # fmt: skip
        """Answers to prompts (``prompt``) with their records' ids. Arguments and errors as those of ``VlmFamily.generate``."""
        if not asked:
            return []
        from vllm import SamplingParams

        network = None if module is None else inner(module)
        if self.adapters:
            self._require(network)
        prompts, settings = [], []
        for name, prompt in asked:
            for number in range(samples):
                prompts.append(prompt)
                settings.append(
                    SamplingParams(
                        n=1, max_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                        seed=rng.key(seed, "generate", step, f"{name}#{number}"), repetition_penalty=repetition_penalty,
                        stop_token_ids=sorted(self.family.end_ids), skip_special_tokens=True,
                        logit_bias=dict.fromkeys(sorted(self.family.placeholder_ids), FORBIDDEN),
                    )
                )  # fmt: skip
        adapter = self._adapter(network) if self.adapters else None
        found = self.engine(network).generate(prompts, settings, lora_request=adapter, use_tqdm=False)
        texts = [text_of(self.family, list(item.outputs[0].token_ids)) for item in found]
        return [texts[start : start + samples] for start in range(0, len(texts), samples)]

    def prompt(self, record: BranchRecord) -> dict[str, Any]:
        """A question as vLLM takes it: token ids with one placeholder a picture, which it expands, and decoded media."""
        family = self.family
        text = render(family, record.id, conversation(record, record.media), generation=True)
        special = not starts_itself(family, text)
        made: dict[str, Any] = {
            "prompt_token_ids": list(family.local_processor().tokenizer(text, add_special_tokens=special).input_ids)
        }
        images, clips = opened(family, record, record.media)
        media: dict[str, Any] = {"image": images} if images else {}
        if clips:
            media["video"] = [
                (clip.frames, {"fps": clip.fps, "total_num_frames": clip.total, "duration": clip.total / clip.fps,
                               "frames_indices": list(clip.indices), "do_sample_frames": False})
                for clip in clips
            ]  # fmt: skip
        return {**made, "multi_modal_data": media} if media else made

    def engine(self, network: Any) -> Any:
        """The running engine; started once."""
        if self._engine is None:
            from vllm import LLM

            config, options = self.family.config, self.options
            extra = self._room(network) if self.adapters else {}
            area = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
            if given := {name: value for name, value in area.items() if value is not None}:
                extra["mm_processor_kwargs"] = given
            self._engine = LLM(
                model=config.path, revision=config.revision, dtype=DTYPES[config.dtype], seed=0,
                gpu_memory_utilization=options.gpu_memory_utilization, max_model_len=options.max_model_len,
                enforce_eager=options.enforce_eager, tensor_parallel_size=options.tensor_parallel_size, **extra,
            )  # fmt: skip
        return self._engine

    def _room(self, network: Any) -> dict[str, Any]:
        """What makes room for the policy's adapter."""
        rank = int(network.peft_config[ADAPTER].r)
        room = next((size for size in RANKS if size >= rank), None)
        if room is None:
            raise ConfigError(f"method.generator: vllm takes adapters up to rank {RANKS[-1]}, tuning.rank is {rank}")
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}

    def _adapter(self, network: Any) -> Any:
        """The policy's adapter of this moment, in a folder and under a number of its own: vLLM keeps what it has read."""
        from vllm.lora.request import LoRARequest

        shutil.rmtree(self._scratch / str(self._sent), ignore_errors=True)
        self._sent += 1
        folder, settings = self._scratch / str(self._sent), network.peft_config[ADAPTER]
        values = {"r": settings.r, "lora_alpha": settings.lora_alpha, "target_modules": sorted(settings.target_modules)}
        self.family.save_lora(lora_state(network), folder, values)
        return LoRARequest(f"step-{self._sent}", self._sent, str(folder))

    def _require(self, network: nn.Module | None) -> None:
        import torch

        if network is None or not is_lora(network):
            raise ConfigError("method.generator: vllm holds the starting weights and takes adapters; use tuning.name: lora")
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ConfigError("method.generator: vllm runs beside one training process; use generator: transformers for several")

    def __del__(self) -> None:
        shutil.rmtree(getattr(self, "_scratch", ""), ignore_errors=True)
