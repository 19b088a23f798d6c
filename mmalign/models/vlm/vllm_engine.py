"""Answers of the current policy from vLLM, which is faster for many long answers (`method.generator: vllm`, extra ``vllm``).

vLLM holds the starting weights; the adapter of the step under way is written to a scratch folder and sent along with the
questions, so it works with `tuning.name: lora` alone. Every answer has a seed of its own from (seed, step, row, number). Its
kernels round otherwise than transformers' and may depend on what else is in a batch, so a resumed run need not answer exactly as
the straight one did: where that is wanted, leave `generator` at its default.

**Not run by its authors**: vLLM could not be installed beside the tested versions. It is written against the documentation and
signatures of vLLM 0.33 (``LLM.generate`` with token prompts, ``multi_modal_data``, ``SamplingParams``, ``LoRARequest``).
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

    Raises:
        MissingExtraError: vLLM is not installed.
    """

    def __init__(self, family: VlmFamily, options: VllmOptions) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise MissingExtraError("vllm", "vllm", "method.generator: vllm")
        self.family, self.options = family, options
        self._engine: Any = None
        self._scratch = Path(tempfile.mkdtemp(prefix="mmalign-vllm-"))
        self._sent = 0

    def generate(
        self, module: nn.Module, records: Sequence[BranchRecord], *, max_new_tokens: int, temperature: float, top_p: float,
        seed: int, step: int, samples: int,
    ) -> list[list[str]]:  # fmt: skip
        """`samples` answers to every record's prompt under the module's adapter.

        Raises:
            ConfigError: the module has no adapter (vLLM holds the starting weights), or several processes train.
            VlmDataError: a prompt that cannot be rendered, or media that cannot be opened.
        """
        from vllm import SamplingParams

        network = inner(module)
        self._require(network)
        prompts, settings = [], []
        for record in records:
            prompt = self.prompt(record)
            for number in range(samples):
                prompts.append(prompt)
                settings.append(
                    SamplingParams(
                        n=1, max_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                        seed=rng.key(seed, "generate", step, f"{record.id}#{number}"),
                        stop_token_ids=sorted(self.family.end_ids), skip_special_tokens=True,
                        logit_bias=dict.fromkeys(sorted(self.family.placeholder_ids), FORBIDDEN),
                    )
                )  # fmt: skip
        found = self.engine(network).generate(
            prompts, settings, lora_request=self._adapter(network), use_tqdm=False
        )
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
            rank = int(network.peft_config[ADAPTER].r)
            room = next((size for size in RANKS if size >= rank), None)
            if room is None:
                raise ConfigError(f"method.generator: vllm takes adapters up to rank {RANKS[-1]}, tuning.rank is {rank}")
            self._engine = LLM(
                model=config.path, revision=config.revision, dtype=DTYPES[config.dtype], seed=0, enable_lora=True, max_loras=1,
                max_lora_rank=room, gpu_memory_utilization=options.gpu_memory_utilization,
                max_model_len=options.max_model_len, enforce_eager=options.enforce_eager,
                tensor_parallel_size=options.tensor_parallel_size,
            )  # fmt: skip
        return self._engine

    def _adapter(self, network: Any) -> Any:
        """The policy's adapter of this moment, in a folder and under a number of its own: vLLM keeps what it has read."""
        from vllm.lora.request import LoRARequest

        shutil.rmtree(self._scratch / str(self._sent), ignore_errors=True)
        self._sent += 1
        folder, settings = self._scratch / str(self._sent), network.peft_config[ADAPTER]
        values = {"r": settings.r, "lora_alpha": settings.lora_alpha, "target_modules": sorted(settings.target_modules)}
        self.family.save_lora(lora_state(network), folder, values)
        return LoRARequest(f"step-{self._sent}", self._sent, str(folder))

    def _require(self, network: nn.Module) -> None:
        import torch

        if not is_lora(network):
            raise ConfigError("method.generator: vllm holds the starting weights and takes adapters; use tuning.name: lora")
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ConfigError("method.generator: vllm runs beside one training process; use generator: transformers for several")

    def __del__(self) -> None:
        shutil.rmtree(getattr(self, "_scratch", ""), ignore_errors=True)
