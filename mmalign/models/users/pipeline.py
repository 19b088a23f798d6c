"""A plain diffusers pipeline that knows users: ``pipeline("a cat", user="alice", user_scale=1.0)``.

Everything else is the pipeline's own. Several users in one call are right: every picture is for its own row's user, whatever
`num_images_per_prompt` and guidance are. Without `user` the pictures are those of the plain pipeline, to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.errors import ConfigError, ModelError
from mmalign.models.users import adapter as adapters
from mmalign.models.users.blend import Mode, made_for, persons
from mmalign.models.users.store import INDEX, UserStore

PARTS = ("unet", "transformer", "prior")
"""Where pipelines hold their denoiser."""
MARK = "mmalign_user_adapter"
"""Key in the denoiser's config.json of a saved pipeline: plain diffusers warns of a setting that it does not know."""
USERS = "users"

User = str | Tensor | Mapping[str, float] | None
"""A known name, an embedding ``[rows, dim]``, a mixture of names, or nobody."""


class PersonalPipeline:
    """A pipeline, its user adapter, and the users it knows.

    Args:
        pipeline: of diffusers, for SD 1.x, 2.x, XL, SD3 or the prior of Stable Cascade.
        folder: where ``user_adapter.safetensors`` and, in ``users/``, its users lie; None where the denoiser carries the
            adapter already.
        store: the users; default: those of the folder.

    Raises:
        ModelError: no denoiser that can have one, or an adapter for another network.
    """

    def __init__(self, pipeline: Any, folder: str | Path | None = None, *, store: UserStore | None = None) -> None:
        self.pipeline, self.part = pipeline, part_of(pipeline)
        network = getattr(pipeline, self.part)
        if folder is not None:
            adapters.load(network, folder)
            if store is None and (Path(folder) / USERS / INDEX).is_file():
                store = UserStore(Path(folder) / USERS)
        if adapters.adapter_of(network) is None:
            raise ModelError("the pipeline's denoiser carries no user adapter; name the folder of one")
        self.network: nn.Module = network
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def __call__(
        self, *args: Any, user: User | Sequence[User] = None, user_scale: float | Sequence[float] = 1.0,
        user_guidance: float = 1.0, user_mode: Mode = "prediction", **words: Any,
    ) -> Any:  # fmt: skip
        """The pipeline's own call, for somebody.

        Args:
            user: one for all prompts, or one for each.
            user_scale: strength, one for all prompts or one for each; 0 is the plain pipeline.
            user_guidance: g in base + g (personal - base).
            user_mode: what a mixture means; see ``models.users.blend``.

        Raises:
            ConfigError: an unknown user, or not one user per prompt.
        """
        adapters.require_attached(self.network)
        count, times = self._prompts(args, words), int(words.get("num_images_per_prompt") or 1)
        given = list(user) if isinstance(user, Sequence) and not isinstance(user, str) else [user] * count
        if len(given) != count:
            raise ConfigError(f"{len(given)} users for {count} prompts; give one for all or one for each")
        mixtures = [self.mixture(one) for one in given]
        if not any(mixtures):
            return self.pipeline(*args, **words)
        who = persons(mixtures, scale=user_scale, guidance=user_guidance, mode=user_mode).repeated(times)
        with made_for(self.network, who):
            return self.pipeline(*args, **words)

    def mixture(self, user: User) -> list[tuple[Tensor, float]]:
        """What a row is for, as embeddings with weights."""
        if user is None:
            return []
        if isinstance(user, Tensor):
            return [(user, 1.0)]
        if self.store is None:
            raise ConfigError("this pipeline was loaded without users; give an embedding, or a folder with users")
        if isinstance(user, str):
            return [(self.store.get(user), 1.0)]
        return [(self.store.get(name), float(weight)) for name, weight in user.items()]

    @staticmethod
    def _prompts(args: Sequence[Any], words: Mapping[str, Any]) -> int:
        prompt = args[0] if args else words.get("prompt")
        if prompt is None:
            embeds = words.get("prompt_embeds")
            if embeds is None:
                raise ConfigError("a call for a user needs a prompt or prompt_embeds")
            return len(embeds)
        return 1 if isinstance(prompt, str) else len(prompt)

    def save_pretrained(self, folder: str | Path, **words: Any) -> Path:
        """The pipeline's folder with the adapter and its users beside; `from_pretrained` reads both.

        Plain diffusers loads the same folder as the base model and warns of a setting it does not know.
        """
        target = Path(folder)
        with self.bare():
            self.pipeline.save_pretrained(target, **words)
        write_beside(self.network, target, self.part, self.store)
        return target

    def bare(self) -> Any:
        """A block in which the denoiser is as it was before the adapter was attached."""
        return adapters.detached(self.network)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **words: Any) -> PersonalPipeline:
        """Read a folder that `save_pretrained` or ``mmalign export`` wrote."""
        import diffusers

        return cls(diffusers.DiffusionPipeline.from_pretrained(str(folder), **words), folder)


def part_of(pipeline: Any) -> str:
    """The name of a pipeline's denoiser.

    Raises:
        ModelError: it has none that can know users.
    """
    for name in PARTS:
        found = getattr(pipeline, name, None)
        if isinstance(found, nn.Module) and type(found).__name__ in adapters.KWARGS:
            return name
    raise ModelError(f"{type(pipeline).__name__}: no denoiser that can know users ({', '.join(adapters.KWARGS)})")


def write_beside(network: nn.Module, folder: Path, part: str, store: UserStore | None) -> None:
    """Put adapter and users beside a saved pipeline, and a mark into its denoiser's settings."""
    adapters.save(network, folder)
    place = folder / part / "config.json"
    values = json.loads(place.read_text(encoding="utf-8"))
    place.write_text(json.dumps({**values, MARK: adapters.FILE}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if store is not None:
        store.copy_to(folder / USERS)


def ip_adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights under the names of IP-Adapter, for ``pipeline.load_ip_adapter`` of plain diffusers (SD, SDXL).

    Raises:
        ModelError: no adapter, or a denoiser whose plain pipeline reads no such names.
    """
    if type(network).__name__ != "UNet2DConditionModel":
        raise ModelError(f"plain pipelines around a {type(network).__name__} read no IP-Adapter of this kind")
    state, places = adapters.adapter_state(network), adapters.sites(network)
    ordered = [name for one in network.attn_processors if (name := one.removesuffix(".processor")) in places]  # type: ignore[union-attr]
    found = {f"image_proj.{name}": value for name, value in state.items() if name.startswith("proj.")}
    for index, name in enumerate(ordered):
        for letter in "kv":
            value = state[f"layers.{adapters.layer_key(name)}.to_{letter}_user.weight"]
            found[f"ip_adapter.{2 * index + 1}.to_{letter}_ip.weight"] = value
    return found


@torch.no_grad()
def ip_adapter_embedding(network: nn.Module, embedding: Tensor) -> Tensor:
    """A user's embedding as `ip_adapter_image_embeds` of plain diffusers takes it. ``[rows, dim]`` to ``[1, 1, rows, dim]``

    With guidance such a pipeline wants ``[negative, positive]`` on the first axis; its negative is an embedding, while here it is
    nobody. Pictures without guidance are equal, with guidance they differ a little.
    """
    adapter = adapters.adapter_of(network)
    if adapter is None:
        raise ModelError("this network carries no user adapter")
    return (embedding + adapter.place.cpu())[None, None]
