"""What families share that come as a folder in the diffusers layout: reading its parts, encoding, and leaving the house again.

A part is read when it is first needed, from safetensors only, and every tensor of it must be in the file: libraries fill what is
missing at random and only log it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mmalign.diffusion.process import NoiseProcess
from mmalign.errors import MissingExtraError, ModelError
from mmalign.models.diffusion.base import DTYPES, DiffusionFamily, FamilyConfig
from mmalign.models.tokenizing import tokenizer_hash
from mmalign.types import Moments

PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}
"""Pipeline class of ``model_index.json`` -> family that loads it."""


ENCODE_PIXELS = {"cpu": 2**17, "other": 2**22}
"""Pixels in one call of a VAE: its first layers hold hundreds of bytes for each, and on a CPU eight pictures of 256 px that
leave the caches take 1.6 times as long as four calls of two."""


class FolderFamily(DiffusionFamily):
    """A family whose files lie in the diffusers layout. A subclass says what its parts are called."""

    network_part: ClassVar[str]
    """Folder of the denoiser."""
    network_class: ClassVar[str]
    pipeline_class: ClassVar[str]
    encoders: ClassVar[Mapping[str, str]]
    """Folder of a text encoder -> class in transformers, in the pipeline's order."""
    tokenizers: ClassVar[Mapping[str, str]]
    """Folder of a tokenizer -> class in transformers."""
    kernels: ClassVar[tuple[str, ...]] = ("sdpa", "xformers", "flash")
    """Attention kernels that the denoiser can run with."""

    network: Any

    def __init__(self, config: FamilyConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.dtype = DTYPES[config.dtype]
        self._parts: dict[str, Any] = {}
        self._hashes: dict[str, dict[str, Any]] = {}
        self._vae_values: Any = None

    @classmethod
    def load(cls, config: FamilyConfig, *, device: torch.device) -> Self:
        import diffusers

        family = cls(config, device)
        scheduler = family._scheduler()
        family.process = family._process(scheduler.config, f"{config.path}/scheduler")
        part = cls.network_part
        with family._reading(part):
            kind = getattr(diffusers, cls.network_class)
            family.network = family._complete(kind, config.network_path or config.path, subfolder=part)
        family._right_network()
        family.network.to(device)
        own_memory(family.network)
        _set_attention(family.network, config.attention, device, cls.kernels, config.name)
        if config.gradient_checkpointing:
            family.network.enable_gradient_checkpointing()
        return family

    @abstractmethod
    def _process(self, scheduler: Mapping[str, Any], source: str) -> NoiseProcess:
        """The process of a scheduler's settings, or a ModelError if it is not this family's."""

    @abstractmethod
    def _right_network(self) -> None:
        """Refuse a denoiser whose settings are not this family's."""

    @classmethod
    @abstractmethod
    def probe(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs without content for one latent at the model's own size, to count what a denoiser of these settings computes."""

    # Parts, loaded when first needed

    def _options(self, dtype: torch.dtype) -> dict[str, Any]:
        config = self.config
        return {"revision": config.revision, "variant": config.variant, "dtype": dtype, "use_safetensors": True}

    def _complete(self, kind: Any, path: str, dtype: torch.dtype = torch.float32, **where: str) -> Any:
        """A module whose every tensor came from the file."""
        part, found = kind.from_pretrained(path, **where, **self._options(dtype), output_loading_info=True)
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            # Old checkpoints hold position_ids, a buffer that is no longer stored.
            names = [name for name in sorted(map(str, found[problem])) if "position_ids" not in name]
            if names:
                raise ValueError(f"{problem.replace('_', ' ')} in its weights, e.g. '{names[0]}' ({len(names)} in all)")
        return part

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        """Library errors about files become one message that names the folder and the remedy."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            path = self.config.path
            hint = (
                f"expected a folder in the diffusers layout with '{part}/' inside, weights as safetensors"
                if Path(path).exists()
                else "no such local folder; a hub id needs network access or a filled cache"
            )
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"model.path: cannot load '{part}' from {path}: {hint} ({reason}){self._other_family()}"
            ) from error

    def _other_family(self) -> str:
        """A hint where a local folder says that it belongs to another family."""
        try:
            index = json.loads((Path(self.config.path) / "model_index.json").read_text(encoding="utf-8"))
            name = PIPELINES.get(str(index["_class_name"]))
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        if name is None or name == PIPELINES[self.pipeline_class]:
            return ""
        return f"; its model_index.json says that it is of another family: use model.name: {name}"

    def _index(self) -> Mapping[str, Any]:
        """The folder's ``model_index.json``."""
        import diffusers

        with self._reading("model_index.json"):
            found: Mapping[str, Any] = getattr(diffusers, self.pipeline_class).load_config(
                self.config.path, revision=self.config.revision
            )
            return found

    def _scheduler(self) -> Any:
        import diffusers

        with self._reading("scheduler"):
            options = {"revision": self.config.revision, "subfolder": "scheduler"}
            values = diffusers.DDIMScheduler.load_config(self.config.path, **options)
            return getattr(diffusers, values["_class_name"]).from_config(values)

    def _part(self, name: str) -> Any:
        """A text encoder, tokenizer, VAE or scheduler, loaded once."""
        if name not in self._parts:
            self._parts[name] = self._load_part(name)
        return self._parts[name]

    def release(self) -> None:
        for name in ("vae", *self.encoders):
            self._parts.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _vae_config(self) -> Any:
        """The VAE's config, kept when the VAE itself is released."""
        if self._vae_values is None:
            self._vae_values = self._part("vae").config
        return self._vae_values

    def _load_part(self, name: str) -> Any:
        import diffusers
        import transformers

        config = self.config
        if name == "scheduler":
            return self._scheduler()
        with self._reading(name):
            if name in self.tokenizers:
                return self._tokenizer(name)
            if name == "vae":
                # The VAE stays in float32: SDXL's overflows in half precision, and a cache is filled once.
                source = {"subfolder": "vae"} if config.vae_path is None else {}
                part = self._complete(diffusers.AutoencoderKL, config.vae_path or config.path, torch.float32, **source)
                self._right_vae(part.config)
            else:
                kind = getattr(transformers, self.encoders[name])
                part = self._complete(kind, config.path, subfolder=name, dtype=self._encoder_dtype(name))
        return part.to(self.device).eval().requires_grad_(False)

    def _encoder_dtype(self, name: str) -> torch.dtype:
        """Precision of a text encoder's weights; its forward pass runs in the configured one."""
        return torch.float32

    def _right_vae(self, config: Any) -> None:
        """Refuse a VAE whose latents are not the denoiser's (ValueError)."""
        channels = self._latent_channels
        if config.latent_channels != channels:
            raise ValueError(f"its latents have {config.latent_channels} channels, the denoiser works on {channels}")

    @property
    def _latent_channels(self) -> int:
        return int(self.network.config.in_channels)

    def _tokenizer(self, name: str) -> Any:
        import transformers

        tokenizer = getattr(transformers, self.tokenizers[name]).from_pretrained(
            self.config.path, subfolder=name, revision=self.config.revision
        )
        # Without its files the library makes an empty one and says nothing: special tokens, and for T5 the mark of a space.
        empty = not set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens, "\u2581"}
        if empty or (self.tokenizers[name] == "CLIPTokenizer" and tokenizer.model_max_length > 10**6):
            raise ValueError(f"no vocabulary: {name}/ lacks tokenizer.json, or its vocabulary files")
        return tokenizer

    # Encoding

    @property
    def latent_factor(self) -> int:
        return 2 ** (len(self._vae_config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Moments:
        vae, budget = self._part("vae"), ENCODE_PIXELS["cpu" if self.device.type == "cpu" else "other"]
        found = []
        for part in pixels.split(max(1, budget // (pixels.shape[-2] * pixels.shape[-1]))):
            posterior = vae.encode(part.to(self.device, torch.float32)).latent_dist
            found.append((posterior.mean.float(), posterior.std.float()))
        means, stds = zip(*found, strict=True)
        return Moments(mean=torch.cat(means), std=torch.cat(stds))

    def scale(self, latents: Tensor) -> Tensor:
        config = self._vae_config
        return (latents.float() - (config.shift_factor or 0.0)) * config.scaling_factor

    def _tokens(self, prompts: Sequence[str], tokenizer: str, length: int | None = None) -> Tensor:
        """Token ids, filled up to `length` (default: the tokenizer's own)."""
        found = self._part(tokenizer)(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt",
            max_length=length or self._part(tokenizer).model_max_length,
        )  # fmt: skip
        return found.input_ids.to(self.device)  # type: ignore[no-any-return]

    def tokens_cut(self, prompts: Sequence[str]) -> list[int]:
        lengths = self._prompt_lengths()
        lost = [0] * len(prompts)
        # A token is a byte or more, so most prompts need no look; the half is for what normalising may add.
        long = [place for place, prompt in enumerate(prompts) if len(prompt.encode()) > max(lengths.values()) // 2]
        if long:
            read = [(self._part(name)([prompts[place] for place in long], truncation=False, verbose=False).input_ids, length)
                    for name, length in lengths.items()]  # fmt: skip
            for number, place in enumerate(long):
                lost[place] = min(max(0, len(ids[number]) - length) for ids, length in read)
        return lost

    def _prompt_lengths(self) -> dict[str, int]:
        """Tokenizers with how many tokens their encoder reads."""
        return {name: int(self._part(name).model_max_length) for name in self.tokenizers}

    def copy_network(self) -> nn.Module:
        return copy.deepcopy(self.network).eval().requires_grad_(False)  # type: ignore[no-any-return]

    # Leaving the house

    def pipeline(self, network: nn.Module) -> Any:
        import diffusers

        names = ("vae", *self.encoders, *self.tokenizers, "scheduler")
        parts = {name: self._part(name) for name in names}
        # A fresh scheduler each time: it carries state from one call to the next.
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        parts[self.network_part] = network
        return getattr(diffusers, self.pipeline_class)(**parts, **self._pipeline_options())

    def _pipeline_options(self) -> dict[str, Any]:
        return {}

    def save_lora(self, state: Mapping[str, Tensor], folder: Path, config: Mapping[str, Any]) -> Path:
        import diffusers

        part = self.network_part
        layers = {f"{part}_lora_layers": dict(state), f"{part}_lora_adapter_metadata": dict(config)}
        getattr(diffusers, self.pipeline_class).save_lora_weights(str(folder), **layers, safe_serialization=True)
        return folder / "pytorch_lora_weights.safetensors"

    def fingerprint(self, part: Literal["vae", "text", "network"]) -> dict[str, Any]:
        if part not in self._hashes:
            asked = {"vae": self._vae_print, "text": self._text_print, "network": self._network_print}[part]
            self._hashes[part] = {"family": self.config.name, "kind": part, **asked()}
        return self._hashes[part]

    def _vae_print(self) -> dict[str, Any]:
        return {"compute_dtype": "fp32", "vae": _module_print(self._part("vae"))}

    def _text_print(self) -> dict[str, Any]:
        found: dict[str, Any] = {"compute_dtype": self.config.dtype, **self._text_settings()}
        for name in self.encoders:
            found[name] = _module_print(self._part(name))
        for name in self.tokenizers:
            if (tokenizer := self._part(name)) is not None:
                found[name] = tokenizer_hash(tokenizer)
        return found

    def _network_print(self) -> dict[str, Any]:
        """The denoiser as it is now, and what decides its timesteps and targets."""
        return {
            "compute_dtype": self.config.dtype, "network": _module_print(self.network),
            "scheduler": _settings_hash(self._part("scheduler").config), **self._network_settings(),
        }  # fmt: skip

    def _network_settings(self) -> dict[str, Any]:
        """Settings beyond the denoiser and its scheduler that predictions depend on."""
        return {}

    def _text_settings(self) -> dict[str, Any]:
        """Settings beyond the encoders themselves that text outputs depend on."""
        return {}


def _set_attention(network: nn.Module, name: str, device: torch.device, offered: Sequence[str], family: str) -> None:
    """Choose the attention kernel; refuse one that cannot run here instead of failing in the first step."""
    if name == "sdpa":
        return
    if name not in offered:
        raise ModelError(f"model.attention: {name} cannot run with model.name: {family}; use {' or '.join(offered)}")
    if name == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("xformers", "xformers", "model.attention: xformers") from error
        if device.type != "cuda":
            raise ModelError(f"model.attention: xformers runs on CUDA devices, this is '{device.type}'; use sdpa")
        enable: Callable[[], None] = network.enable_xformers_memory_efficient_attention  # type: ignore[assignment]
    else:
        if device.type != "cuda":
            raise ModelError(f"model.attention: flash runs on CUDA devices, this is '{device.type}'; use sdpa")

        def enable() -> None:
            network.set_attention_backend("flash")  # type: ignore[operator]

    try:
        enable()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ModelError(f"model.attention: {name} cannot run here ({error}); use sdpa") from error


def own_memory(module: nn.Module) -> None:
    """Give every weight its own aligned memory instead of a mapping of the file.

    Kernels take another path for unaligned weights, which would part the policy from a copied reference by 1e-6; and a
    file that is replaced under a run must not change it.
    """
    for value in (*module.parameters(), *module.buffers()):
        value.data = value.data.clone()


def _module_print(module: Any) -> dict[str, str] | None:
    """Weights and settings of a part; None for one that the model does without."""
    return None if module is None else {"weights": _state_hash(module), "config": _settings_hash(module.config)}


def _state_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
    return digest.hexdigest()[:32]


def _settings_hash(config: Any) -> str:
    """Hash of a model's settings without what changes with where it was read from or by which version."""
    values = dict(config) if isinstance(config, dict) else config.to_dict()
    moving = {"_name_or_path", "transformers_version", "_diffusers_version", "torch_dtype", "dtype"}
    return _text_hash(json.dumps({key: values[key] for key in sorted(values) if key not in moving}, default=str))


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
