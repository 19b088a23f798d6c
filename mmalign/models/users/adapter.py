"""User attention for a whole denoiser: attach, switch, save as a small file of its own, load again.

Families: Stable Diffusion 1.x, 2.x and XL (every cross-attention), SD3 and 3.5 (every joint attention, the picture's queries
alone), and the prior of Stable Cascade (every attention block). The weights lie in ``network.user_adapter``; the network's own
layers and processors stay what they are underneath.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign import rng
from mmalign.errors import ModelError
from mmalign.models.users.attention import UserLayer, UserProcessor, UserTokens

FILE = "user_adapter.safetensors"
KWARGS = {
    "UNet2DConditionModel": "cross_attention_kwargs",
    "SD3Transformer2DModel": "joint_attention_kwargs",
    "StableCascadeUNet": None,
}
"""Denoiser -> the argument that reaches its attention layers; None: it has none, and tokens are held for the call instead."""
HANDED = "ip_hidden_states"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What a user embedding looks like, and what the adapter may hold besides."""

    rows: int
    """Rows of an embedding; each becomes one token."""
    dim: int
    """Width of a row."""
    users: int = 0
    """Size of the adapter's own table of users; 0: embeddings are given."""
    prototypes: int = 0
    """The table holds mixtures of so many learned prototypes instead of free embeddings."""


class UserAdapter(nn.Module):
    """Projection of embeddings to tokens, and keys and values of every attention layer.

    Args:
        width: of the tokens.
        inner: layer name -> heads x size of a head.
        seed: of the initial values.
    """

    def __init__(self, settings: AdapterSettings, *, width: int, inner: Mapping[str, int], seed: int = 0) -> None:
        super().__init__()
        self.settings, self.width = settings, width
        # One token per row. The layout of diffusers' IPAdapterFullImageProjection, so that plain pipelines can read it.
        self.proj = nn.Sequential(
            nn.Linear(settings.dim, settings.dim), nn.GELU(), nn.Linear(settings.dim, width), nn.LayerNorm(width)
        )
        # Which row a token came from: the projection is the same for all of them.
        self.place = nn.Parameter(torch.empty(settings.rows, settings.dim))
        self.layers = nn.ModuleDict({layer_key(name): UserLayer(width, size) for name, size in inner.items()})
        shape = (settings.rows, settings.dim)
        if settings.users and settings.prototypes:
            self.prototypes = nn.Parameter(torch.empty(settings.prototypes, *shape))
            self.logits = nn.Parameter(torch.empty(settings.users, settings.prototypes))
        elif settings.users:
            self.table = nn.Parameter(torch.empty(settings.users, *shape))
        self.places: dict[str, Any] = {}
        """Attention layers by name, as they were when the adapter was attached."""
        self.held: UserTokens | None = None
        """Tokens for networks that hand nothing down, during one evaluation."""
        self._start(seed)

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        for name, value in self.named_parameters():
            draw = torch.empty(value.shape).normal_(generator=rng.torch_stream(seed, "user-adapter", 0, name))
            if name.endswith("to_v_user.weight") or name == "place" or (name.startswith("proj") and name.endswith("bias")):
                value.zero_()
            elif name == "proj.3.weight":
                value.fill_(1.0)
            elif name == "logits":
                value.copy_(0.01 * draw)
            elif name in ("table", "prototypes"):
                value.copy_(draw if name == "prototypes" else 0.1 * draw)
            else:
                value.copy_(draw / value.shape[-1] ** 0.5)

    def embeddings(self, users: Tensor) -> Tensor:
        """Rows of the own table: indices ``[...]`` to embeddings ``[..., rows, dim]``."""
        if self.settings.prototypes:
            return torch.einsum("...k,krd->...rd", self.logits[users].softmax(-1), self.prototypes)
        return self.table[users]

    def tokens(self, users: Tensor, weights: Tensor) -> UserTokens:
        """Embeddings ``[B, S, rows, dim]`` (or indices ``[B, S]`` into the own table) and weights ``[B, S]`` to tokens.

        Raises:
            ModelError: embeddings of another shape than this adapter's.
        """
        if not users.is_floating_point():
            if not self.settings.users:
                raise ModelError("this user adapter has no table of users: give embeddings, not indices")
            users = self.embeddings(users)
        if users.ndim != 4 or users.shape[2:] != (self.settings.rows, self.settings.dim):
            raise ModelError(
                f"user embeddings must be [batch, users, {self.settings.rows}, {self.settings.dim}], got {list(users.shape)}; "
                f"they come from another encoder"
            )
        if weights.shape != users.shape[:2]:
            raise ModelError(f"weights of the users must be {list(users.shape[:2])}, got {list(weights.shape)}")
        return UserTokens(tokens=self.proj(users.to(self.place.dtype) + self.place), weights=weights)

    # Called by the network

    def before_forward(self, network: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Turn the argument `user` of a call, (embeddings, weights), into tokens that reach the attention layers.

        A forward pre-hook of the network. Where every weight is zero and no gradient is wanted, the network runs as it was.
        """
        self.held = None
        if adapter_of(network) is None:
            return args, kwargs  # detached for a while
        require_attached(network)
        users = kwargs.pop("user", None)
        if users is None or not (torch.is_grad_enabled() or bool((users[1] != 0).any())):
            return args, kwargs
        found = self.tokens(*users)
        name = KWARGS[type(network).__name__]
        if name is None:
            if torch.is_grad_enabled() and getattr(network, "gradient_checkpointing", False):
                raise ModelError(
                    f"{type(network).__name__} hands nothing down to its attention, so activation checkpointing would recompute "
                    f"without the user; switch it off"
                )
            self.held = found
        else:
            kwargs[name] = {**(kwargs.get(name) or {}), HANDED: found}
        return args, kwargs

    def after_forward(self, network: Any, args: Any, output: Any) -> None:
        """Let go of what was held for the call."""
        self.held = None

    def refuse_saving(self, *args: Any, **kwargs: Any) -> None:
        """Stands in the network's `save_pretrained`: a diffusers folder has no place for these weights.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "this network carries a user adapter, which save_pretrained would lose; write both with "
            "mmalign.personalize.save_pipeline(pipeline, folder), or the adapter alone with models.users.save(network, folder)"
        )


def layer_key(name: str) -> str:
    """A layer's name among the adapter's own layers."""
    return name.replace(".", "/")  # a module's name may not hold dots


def sites(network: nn.Module) -> dict[str, Any]:
    """The attention layers that read the prompt, by name, in the network's order.

    Raises:
        ModelError: a network of another kind.
    """
    kind = type(network).__name__
    if kind not in KWARGS:
        raise ModelError(f"user attention has no place in a {kind}; it fits {', '.join(KWARGS)}")
    ends = {"UNet2DConditionModel": ".attn2", "SD3Transformer2DModel": ".attn", "StableCascadeUNet": ".attention"}[kind]
    return {name: part for name, part in network.named_modules() if name.endswith(ends) and hasattr(part, "processor")}


def _width(network: Any) -> int:
    """Width of the tokens: that of the text's."""
    config = network.config
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        value = config.cross_attention_dim
        return int(value if isinstance(value, int) else value[0])
    return int(config.joint_attention_dim if kind == "SD3Transformer2DModel" else config.conditioning_dim)


def attach(network: nn.Module, settings: AdapterSettings, *, seed: int = 0) -> UserAdapter:
    """Give a denoiser user attention. The weights are float32 and want gradients; the rest stays as it is.

    Raises:
        ModelError: it has one already, or has no place for it.
    """
    if adapter_of(network) is not None:
        raise ModelError("this network already carries a user adapter")
    places = sites(network)
    inner = {name: int(part.to_q.out_features) for name, part in places.items()}
    adapter = UserAdapter(settings, width=_width(network), inner=inner, seed=seed)
    device = next(network.parameters()).device
    network.add_module("user_adapter", adapter.to(device))
    adapter.places = places
    for name, part in places.items():
        part.processor = UserProcessor(part.processor, adapter.layers[layer_key(name)], adapter)  # type: ignore[arg-type]
    network.register_forward_pre_hook(adapter.before_forward, with_kwargs=True)
    network.register_forward_hook(adapter.after_forward)
    network.save_pretrained = adapter.refuse_saving  # type: ignore[assignment]
    return adapter


def size_of(network: nn.Module, settings: AdapterSettings) -> int:
    """Weights of the adapter that a network would get; the network may have no storage."""
    width, dim, rows = _width(network), settings.dim, settings.rows
    layers = sum(2 * width * int(part.to_q.out_features) for part in sites(network).values())
    learned = settings.users * settings.prototypes + settings.prototypes * rows * dim if settings.prototypes else (
        settings.users * rows * dim)  # fmt: skip
    return layers + (dim + 1) * dim + (dim + 1) * width + 2 * width + rows * dim + learned


def adapter_of(network: nn.Module) -> UserAdapter | None:
    """The user adapter of a network, or None."""
    found = getattr(network, "user_adapter", None)
    return found if isinstance(found, UserAdapter) else None


def require_attached(network: nn.Module) -> None:
    """Refuse a network some of whose processors were replaced after attaching, which would lose the user in silence.

    Raises:
        ModelError: names the layer.
    """
    adapter = adapter_of(network)
    for name, part in adapter.places.items() if adapter is not None else ():
        if not isinstance(part.processor, UserProcessor):
            raise ModelError(
                f"the attention processor of '{name}' was replaced by {type(part.processor).__name__} after the user adapter "
                f"was attached (enable_attention_slicing, xformers, set_attn_processor do that); choose it before attaching"
            )


@contextmanager
def detached(network: nn.Module) -> Iterator[None]:
    """Inside the block the network is as it was before the adapter was attached: own processors, own weights, own saving."""
    adapter = adapter_of(network)
    if adapter is None:
        yield
        return
    places = sites(network)
    kept = {name: part.processor for name, part in places.items()}
    del network.user_adapter
    network.__dict__.pop("save_pretrained", None)
    for name, part in places.items():
        part.processor = kept[name].inner
    try:
        yield
    finally:
        network.add_module("user_adapter", adapter)
        network.save_pretrained = adapter.refuse_saving  # type: ignore[assignment]
        for name, part in places.items():
            part.processor = kept[name]


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights on the CPU.

    Raises:
        ModelError: the network carries none.
    """
    adapter = adapter_of(network)
    if adapter is None:
        raise ModelError("this network carries no user adapter")
    return {name: value.detach().cpu().contiguous() for name, value in adapter.state_dict().items()}


def save(network: nn.Module, folder: str | Path) -> Path:
    """Write ``user_adapter.safetensors``, settings included."""
    from safetensors.torch import save_file

    state, adapter = adapter_state(network), adapter_of(network)
    assert adapter is not None
    told = {"settings": asdict(adapter.settings), "network": type(network).__name__, "version": 1}
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"mmalign_user_adapter": json.dumps(told)})
    return path


def load(network: nn.Module, folder: str | Path) -> UserAdapter:
    """Attach the adapter of a folder (or file) to a network.

    Raises:
        ModelError: no such file, not an adapter, one for another network, or weights that do not fit.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) if Path(folder).is_file() else Path(folder) / FILE
    if not path.is_file():
        raise ModelError(f"{path}: no user adapter there; a personalised run or export has {FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("mmalign_user_adapter", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as a user adapter: {error}") from error
    if not isinstance(told, dict):
        raise ModelError(f"{path}: not a user adapter of mmalign (its header says nothing of one)")
    if told["network"] != type(network).__name__:
        raise ModelError(f"{path}: made for a {told['network']}, this is a {type(network).__name__}")
    adapter = attach(network, AdapterSettings(**told["settings"]))
    own = adapter.state_dict()
    wrong = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise ModelError(f"{path}: made for another network, e.g. '{wrong[0]}' does not fit")
    adapter.load_state_dict(state)
    return adapter
