"""The users of a personalised run: which rows have one, what embedding comes with each row, and what the run keeps of them.

``RUN/users/`` holds ``adapter.json`` (sizes of the adapter), ``standard.safetensors`` (mean and deviation of raw embeddings),
and the store of ``models.users.store``. Raw embeddings lie in the table's cache, found by the content of the pairs they came
from; no name of a user is written anywhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.errors import ConfigError, DataError, ModelError
from mmalign.experiment.settings import ExperimentConfig
from mmalign.experiment.supports import Supports, make_supports
from mmalign.models.users.adapter import AdapterSettings, adapter_of, attach, save
from mmalign.models.users.encoders import embed, key_of, load_encoder, pair_key, shape_of, support_key
from mmalign.models.users.settings import UsersConfig
from mmalign.models.users.store import UserStore
from mmalign.trainers import METHODS
from mmalign.types import PairBatch, PairRecord

if TYPE_CHECKING:
    from mmalign.data import CheckResult, PairTable
    from mmalign.data.order import Order

FOLDER, SIZES, STANDARD = "users", "adapter.json", "standard.safetensors"
KEPT_PAIRS = 64
"""A trained user's embedding in the store is made from so many of their pairs at most."""


def users_of(config: ExperimentConfig) -> UsersConfig | None:
    """The users an experiment trains for, or None."""
    found: UsersConfig | None = METHODS.get(config.method_name).users(config.method)
    return found


def attach_users(config: ExperimentConfig, network: nn.Module, seed: int) -> None:
    """Give a network the user attention of the experiment; nothing where it has no users."""
    if users_of(config) is not None:
        attach(network, adapter_settings(config), seed=seed)


def adapter_settings(config: ExperimentConfig) -> AdapterSettings:
    """Sizes of the adapter: those of the run folder, or what encoder and table say.

    Raises:
        ConfigError: the experiment has no users, or its table names none.
    """
    settings = users_of(config)
    if settings is None:
        raise ConfigError(f"method.name: '{config.method_name}' trains for no users; use personalized_dpo")
    kept = config.folder / FOLDER / SIZES
    if kept.is_file():
        return AdapterSettings(**json.loads(kept.read_text()))
    rows, dim = shape_of(settings)
    if settings.source == "encoded":
        return AdapterSettings(rows=rows, dim=dim)
    from mmalign.experiment.streams import open_pairs

    count = len(names_of(open_pairs(config.data)))
    prototypes = settings.prototypes if settings.source == "prototypes" else 0
    return AdapterSettings(rows=rows, dim=dim, users=count, prototypes=prototypes)


def names_of(table: PairTable) -> list[str]:
    """The users of a table, in the order of their names.

    Raises:
        ConfigError: no row has one.
    """
    found = set() if "user" not in table.columns else {
        str(name) for batch in table.storage.batches(["user"]) for name in batch.column(0).to_pylist() if name is not None
    }  # fmt: skip
    if not found:
        raise ConfigError(f"data.manifest: {table.path} has no column 'user' with names; personalised methods need one per pair")
    return sorted(found)


@dataclass(kw_only=True)
class People:
    """The users of a run with their pairs."""

    config: ExperimentConfig
    settings: UsersConfig
    table: PairTable
    rows: np.ndarray
    """Rows that can be trained on, [n] int64."""
    owners: Mapping[int, str]
    """Row -> user, of all usable rows with a user."""
    dropped: Mapping[str, int]
    """Rows left out, by reason."""
    keys: Mapping[int, str]
    """Row -> key of its pair."""
    supports: Supports | None = None
    places: Mapping[str, int] | None = None
    """User -> place in the adapter's own table."""
    features: Tensor | None = None
    """Standardised embeddings [n, rows, dim]: of single pairs, or of groups."""
    found: Mapping[Any, int] | None = None
    """Row, or group, -> its place in `features`."""

    def order(self, *, seed: int, global_batch: int) -> Order | None:
        """Rows in the proportions of `users.sampling`; None: by the number of their pairs, as the loader does it."""
        if self.settings.sampling == "pairs":
            return None
        from mmalign.data.orders import MixtureOrder

        by_user: dict[str, list[int]] = {}
        for row in self.rows.tolist():
            by_user.setdefault(self.owners[row], []).append(row)
        parts = [np.asarray(rows, dtype=np.int64) for _, rows in sorted(by_user.items())]
        power = {"uniform": 0.0, "sqrt": 0.5}[self.settings.sampling]
        return MixtureOrder(
            table_fingerprint=self.table.fingerprint, parts=parts, weights=[len(part) ** power for part in parts], seed=seed,
            global_batch=global_batch, shuffle=self.config.data.shuffle,
        )  # fmt: skip

    def embedding(self, row: int, *, step: int, sample: str) -> Tensor:
        """What stands for a row's user in this step: ``[rows, dim]``, or a place in the table (scalar int64)."""
        user = self.owners[row]
        if self.places is not None:
            return torch.tensor(self.places[user])
        assert self.supports is not None and self.features is not None and self.found is not None
        support = self.supports.draw(user, row, seed=self.config.run.seed, step=step, sample=sample)
        if not self.supports.free:
            return self.features[self.found[support]]
        mean = self.features[[self.found[one] for one in support]].mean(0)
        return mean * len(support) ** 0.5  # deviation of single pairs is 1, so that of their mean is restored

    def of(self, user: str) -> list[int]:
        """A user's usable rows."""
        return [row for row, owner in self.owners.items() if owner == user]


class UserStream:
    """A loader whose batches bring the embeddings of their users. Everything else is the loader's."""

    def __init__(self, loader: Any, people: People) -> None:
        self._loader, self._people = loader, people
        self._row_of = {str(people.table.value(row, "id")): row for row in people.rows.tolist()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def micro_batches(self, start_step: int = 0) -> Iterator[tuple[int, int, PairBatch]]:
        """As the loader's."""
        for step, micro, batch in self._loader.micro_batches(start_step):
            yield step, micro, self.with_users(batch, step)

    def read(self, slots: Any, step: int = 0) -> PairBatch:
        """As the loader's."""
        return self.with_users(self._loader.read(slots, step), step)

    def with_users(self, batch: PairBatch, step: int) -> PairBatch:
        """The batch with one embedding per row; draws count as in the rest of the batch: by step, or by stored draw."""
        at = [step] * len(batch) if batch.draws is None else list(batch.draws)
        found = [
            self._people.embedding(self._row_of[name], step=when, sample=name)
            for name, when in zip(batch.ids, at, strict=True)
        ]
        return replace(batch, user=torch.stack(found))


def prepare_people(config: ExperimentConfig, table: PairTable, checked: CheckResult, *, root: Path, main: bool) -> People | None:
    """The users behind the usable rows, their embeddings made and cached; None where the experiment has no users.

    Raises:
        ConfigError: no users.
        DataError: no user has enough pairs.
    """
    settings = users_of(config)
    if settings is None:
        return None
    names = names_of(table)
    owners = {row: str(name) for row in checked.rows.tolist() if (name := table.value(row, "user")) is not None}
    without = len(checked.rows) - len(owners)
    keys, pictures = _contents(table, owners, checked)
    people = People(
        config=config, settings=settings, table=table, rows=np.array(sorted(owners), dtype=np.int64), owners=owners,
        dropped={"no_user": without} if without else {}, keys=keys,
    )  # fmt: skip
    if settings.source == "encoded":
        free = settings.encoder != "vlm"
        supports = make_supports(
            owners, pictures, shots=settings.shots, most=settings.groups, free=free, seed=config.run.seed
        )
        usable = [row for row in sorted(owners) if supports.has(owners[row], row)]
        if len(usable) < len(owners):
            people.dropped = {**people.dropped, "no_support": len(owners) - len(usable)}
        if not usable:
            raise DataError(
                f"{table.path}: no user has pairs enough: {settings.shots} (users.shots) besides the one trained on, with other "
                f"pictures; {len(names)} users, {len(owners)} rows"
            )
        people.rows, people.supports = np.array(usable, dtype=np.int64), supports
        _encode(people, root, main)
    else:
        people.places = {name: place for place, name in enumerate(names)}
    if main:
        folder = config.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SIZES).write_text(json.dumps(asdict(adapter_settings(config))) + "\n")
        kept = len({owners[row] for row in people.rows.tolist()})
        print(f"users: {kept} of {len(names)}, {len(people.rows)} pairs" + "".join(
            f"; {number} rows left out ({reason})" for reason, number in people.dropped.items()))  # fmt: skip
    return people


def _contents(
    table: PairTable, owners: Mapping[int, str], checked: CheckResult
) -> tuple[dict[int, str], dict[int, frozenset[bytes]]]:
    """Key of every row's pair, and hashes of its pictures."""
    import hashlib

    from mmalign.media import read_bytes

    keys, pictures = {}, {}
    for row in owners:
        if checked.media is not None:
            sides = [bytes(value) for value in checked.media.hashes[row]]
        else:
            record = table[row]
            sides = [hashlib.sha256(read_bytes(one)[0]).digest() for one in (record.chosen, record.rejected)]
        keys[row], pictures[row] = pair_key(table.prompt(row), *sides), frozenset(sides)
    return keys, pictures


def _encode(people: People, root: Path, main: bool) -> None:
    """Fill the cache with the raw embeddings that are missing, and standardise them."""
    from mmalign import data

    settings, supports = people.settings, people.supports
    assert supports is not None
    device = torch.device("cuda" if torch.cuda.is_available() and people.config.run.device != "cpu" else "cpu")
    encoder = load_encoder(settings, device)
    cache = data.Cache.open_or_create(root, "users", dict(encoder.fingerprint()))
    units: list[tuple[int, ...]] = (
        [(row,) for row in sorted(people.owners)] if supports.free else sorted(
            group for groups in supports.groups.values() for group in groups)
    )  # fmt: skip
    keys = [support_key([people.keys[row] for row in unit]) for unit in units]
    cache.fill(
        ((key, unit) for key, unit in zip(keys, units, strict=True)),
        lambda some: {"embedding": encoder([[people.table[row] for row in unit] for unit in some])},
        batch_size=16 if supports.free else 1, progress=main, total=len(units),
    )  # fmt: skip
    raw = cache.gather(keys)["embedding"]
    mean, std = raw.mean(0), raw.std(0).clamp(min=1e-6)
    people.features = (raw - mean) / std
    people.found = {unit[0] if supports.free else unit: place for place, unit in enumerate(units)}
    if main:
        from safetensors.torch import save_file

        folder = people.config.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"mean": mean.contiguous(), "std": std.contiguous()}, folder / STANDARD)


def encoder_print(config: ExperimentConfig) -> dict[str, Any]:
    """What identifies the embeddings of a run, for its store."""
    settings = users_of(config)
    assert settings is not None
    encoder = settings.encoder if settings.source == "encoded" else ""
    return {"source": settings.source, "encoder": encoder, "shots": settings.shots}


def write_store(config: ExperimentConfig, people: People, policy: nn.Module) -> UserStore:
    """Keep an embedding of every trained user in the run folder."""
    store = UserStore.create(config.folder / FOLDER, encoder=encoder_print(config))
    adapter = adapter_of(policy)
    assert adapter is not None
    found: dict[str, tuple[Tensor, Sequence[str]]] = {}
    for user in sorted(set(people.owners.values())):
        rows = people.of(user)
        keys = [people.keys[row] for row in rows]
        if people.places is not None:
            with torch.no_grad():
                found[user] = adapter.embeddings(torch.tensor(people.places[user], device=adapter.place.device)), keys
        elif people.supports is not None and people.features is not None and people.found is not None:
            if people.supports.free:
                some = rows[:KEPT_PAIRS]
                mean = people.features[[people.found[row] for row in some]].mean(0) * people.settings.shots**0.5
                found[user] = mean, [people.keys[row] for row in some]
            elif groups := people.supports.groups[user]:
                found[user] = people.features[[people.found[group] for group in groups]].mean(0), keys
    store.add_all(found, kind="trained")
    return store


def save_users(config: ExperimentConfig, family: Any, policy: nn.Module, folder: Path, *, beside_pipeline: bool) -> None:
    """Adapter, users and standard for an export; under the names of IP-Adapter as well where plain pipelines read those."""
    from safetensors.torch import save_file

    from mmalign.models.users.pipeline import USERS, ip_adapter_state, write_beside

    store = UserStore(config.folder / FOLDER)
    if beside_pipeline:
        write_beside(policy, folder, family.network_part, store)
    else:
        save(policy, folder)
        store.copy_to(folder / USERS)
        if type(policy).__name__ == "UNet2DConditionModel":
            save_file(ip_adapter_state(policy), folder / "ip_adapter.safetensors")
    for name in (SIZES, STANDARD):
        if (config.folder / FOLDER / name).is_file():
            shutil.copyfile(config.folder / FOLDER / name, folder / USERS / name)


def encode_user(
    config: ExperimentConfig, records: Sequence[PairRecord], device: torch.device
) -> tuple[Tensor, tuple[str, ...]]:
    """The embedding of a new user from their pairs, as the run's adapter reads it, and the keys of the pairs.

    Raises:
        ModelError: the run's users are fitted, or its standard is missing.
    """
    from safetensors.torch import load_file

    settings = users_of(config)
    assert settings is not None
    place = config.folder / FOLDER / STANDARD
    if not place.is_file():
        raise ModelError(f"{place} is missing: embeddings of new users cannot be brought to the scale of the trained ones")
    standard = load_file(place)
    encoder = load_encoder(settings, device)
    keys = tuple(key_of(record) for record in records)
    if encoder.unit == "pair":
        raw = encoder([[record] for record in records])
        return ((raw - standard["mean"]) / standard["std"]).mean(0) * settings.shots**0.5, keys
    groups = [list(records[start : start + settings.shots]) for start in range(0, len(records), settings.shots)]
    whole = [group for group in groups if len(group) == settings.shots] or groups[:1]
    raw = torch.stack([embed(encoder, group) for group in whole])
    return ((raw - standard["mean"]) / standard["std"]).mean(0), keys
