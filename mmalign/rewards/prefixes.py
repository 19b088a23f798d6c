"""Image towers whose first blocks hold equal weights: these blocks run once per picture, the others once per reward.

Fine-tuned encoders often keep the first blocks of the model they came from (HPS v2, arXiv:2306.09341, trains the upper part of
LAION's ViT-H/14). Equality is decided by hashing the weights as they run, block by block, and stops at the first block in which
all differ. Rewards with one encoder share more than this and are grouped before; text towers are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mmalign.rewards.base import EncodingBackend
from mmalign.rewards.batching import EncodeEach
from mmalign.rewards.clip_net import VisionTower
from mmalign.rewards.files import fingerprint

Hashes = dict[tuple[str, int], str]
"""By image key and depth: the hash of the stem (-1) or of one block. Rewards in use do not change their weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Blocks ``[start, stop)``, equal in all members; then the branches in which they differ."""

    start: int
    stop: int
    members: tuple[str, ...]
    branches: tuple[Branch, ...]
    """Empty after the last block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Encoders that begin with the same pixels: one alone, or several with a common beginning."""

    members: Mapping[str, EncodingBackend]
    """By encoder key; all have one preprocessing, statistics, device and precision."""
    root: Branch | None
    """None: an encoder that shares nothing."""

    def blocks(self, wanted: Sequence[str]) -> tuple[int, int]:
        """Tower blocks one picture passes for the wanted members, and those it would pass besides without sharing."""
        depths = [0 if (tower := self.members[key].image_tower) is None else len(tower.blocks) for key in wanted]
        run = sum(depths) if self.root is None else _length(self.root, frozenset(wanted))
        return run, sum(depths) - run

    def encoder(self, wanted: Sequence[str]) -> EncodeEach:
        """The function that encodes pictures for the wanted members, in that order."""
        root, members, only = self.root, self.members, frozenset(wanted)
        if root is None or len(only) == 1:
            return lambda pixels: tuple(members[key].encode_images(pixels) for key in wanted)
        stem = _tower(members[root.members[0]]).stem

        def encode(pixels: Tensor) -> tuple[Tensor, ...]:
            found: dict[str, Tensor] = {}
            self._walk(root, stem(pixels), only, found)
            return tuple(found[key] for key in wanted)

        return encode

    def _walk(self, branch: Branch, states: Tensor, only: frozenset[str], found: dict[str, Tensor]) -> None:
        here = [key for key in branch.members if key in only]
        if not here:
            return
        blocks = _tower(self.members[here[0]]).blocks
        last = None if branch.branches else blocks[branch.stop - 1]
        for block in blocks[branch.start : branch.stop - (last is not None)]:
            states = block(states, causal=False)
        for child in branch.branches:
            self._walk(child, states, only, found)
        if last is not None:
            # As each reward alone would run it: whoever reads the first state only has no other one made.
            kinds = {self.members[key].reads_first for key in here}
            ways = {first: last(states, causal=False, first=first) for first in kinds}
            found.update({key: self.members[key].finish_images(ways[self.members[key].reads_first]) for key in here})


def group_encoders(encoders: Mapping[str, EncodingBackend], hashes: Hashes) -> list[Group]:
    """Put encoders (by key) whose towers begin with equal weights into one group; every encoder is in exactly one.

    Args:
        hashes: those known already; new ones are added.
    """
    groups = [Group(members={key: item}, root=None) for key, item in encoders.items() if item.image_tower is None]
    alike: dict[tuple[object, ...], list[str]] = {}
    for key, item in encoders.items():
        if (tower := item.image_tower) is not None:
            kind = (tower.architecture, tower.positions.dtype, item.device, item.preprocess, item.mean, item.std)
            alike.setdefault(kind, []).append(key)
    for keys in alike.values():
        for same in _split(encoders, keys, -1, hashes):
            root = _branch(encoders, tuple(same), 0, hashes) if len(same) > 1 else None
            groups.append(Group(members={key: encoders[key] for key in same}, root=root))
    return groups


def _branch(encoders: Mapping[str, EncodingBackend], keys: tuple[str, ...], start: int, hashes: Hashes) -> Branch:
    """The tree below block `start` of encoders that are equal up to there."""
    depth = len(_tower(encoders[keys[0]]).blocks)
    for stop in range(start, depth if len(keys) > 1 else start):
        parts = _split(encoders, keys, stop, hashes)
        if len(parts) > 1:
            branches = tuple(_branch(encoders, tuple(part), stop, hashes) for part in parts)
            return Branch(start=start, stop=stop, members=keys, branches=branches)
    return Branch(start=start, stop=depth, members=keys, branches=())


def _split(encoders: Mapping[str, EncodingBackend], keys: Sequence[str], depth: int, hashes: Hashes) -> list[list[str]]:
    """Encoders with equal weights at one depth together; one encoder alone is not worth a hash."""
    if len(keys) == 1:
        return [list(keys)]
    parts: dict[str, list[str]] = {}
    for key in keys:
        place = (encoders[key].image_key, depth)
        if place not in hashes:
            tower = _tower(encoders[key])
            hashes[place] = fingerprint(tower.stem_state() if depth < 0 else tower.blocks[depth].state_dict())
        parts.setdefault(hashes[place], []).append(key)
    return list(parts.values())


def _length(branch: Branch, only: frozenset[str]) -> int:
    if only.isdisjoint(branch.members):
        return 0
    return branch.stop - branch.start + sum(_length(child, only) for child in branch.branches)


def _tower(backend: EncodingBackend) -> VisionTower:
    tower = backend.image_tower
    if tower is None:
        raise TypeError(f"the image encoder of '{backend.name}' has no tower to share")
    return tower
