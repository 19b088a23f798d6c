"""RankDPO through the real tiny network and through `train`: lists, masks, memory, utilities."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from mmalign import rng
from mmalign.data import CheckPolicy
from mmalign.data.checking import check_any
from mmalign.errors import ConfigError, DataError
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.models.diffusion.lists import list_inputs
from mmalign.models.reference import AdapterOffReference
from mmalign.objectives.utilities import disagreement, win_rates
from mmalign.trainers.base import Parts
from mmalign.trainers.rank_dpo import RankDPO, RankDPOConfig
from mmalign.types import Geometry, RankedBatch, Side
from tests.fixtures.batches import PROMPTS, context, gradients, lora_policy

Families = Callable[[str], DiffusionFamily]


def ranked_batch(number: int = 2, width: int = 4, absent: tuple[tuple[int, int], ...] = ()) -> RankedBatch:
    """Lists of pictures of their own with scores of two rewards."""
    ids = tuple(f"list-{row}" for row in range(number))
    names = [f"{name}/{place}" for name in ids for place in range(width)]
    pixels = torch.nn.functional.interpolate(rng.normal(names, (3, 4, 4), seed=0, purpose="p"), (64, 64)).clamp(-1, 1)
    size = torch.full((number * width, 2), 64)
    mask = torch.ones(number, width, dtype=torch.bool)
    for place in absent:
        mask[place] = False
        pixels[place[0] * width + place[1]] = 0
    scores = {
        reward: torch.where(mask, rng.uniform(names, seed=0, purpose=reward).float().view(number, width), 0.0)
        for reward in ("first", "second")
    }
    return RankedBatch(
        ids=ids, prompts=PROMPTS[:number],
        images=Side(geometry=Geometry(original=size, crop=0 * size, target=size), pixels=pixels),
        mask=mask, weight=torch.ones(number), scores=scores,
    )  # fmt: skip


def trainer(family: DiffusionFamily, policy: Any, **settings: Any) -> RankDPO:
    parts = Parts(family=family, policy=policy, reference=AdapterOffReference(policy), steps=10)
    return RankDPO.build(RankDPOConfig(**{"beta": 500.0, **settings}), parts)


# Utilities


def test_win_rates_by_hand() -> None:
    """Two rewards, three candidates: wins (2+1, 1+2, 0+0) of 4 comparisons each; the third is absent in the second list."""
    scores = torch.tensor([[[3.0, 2.0, 1.0], [1.0, 2.0, 9.0]], [[2.0, 3.0, 1.0], [1.0, 1.0, 9.0]]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert win_rates(scores, mask).tolist() == [[0.75, 0.75, 0.0], [0.0, 0.5, 0.0]]
    # Only the first pair of the first list splits the rewards, evenly: 1 of 3 pairs.
    assert disagreement(scores, mask).tolist() == pytest.approx([1 / 3, 0.0])


def test_win_rates_sum_to_half_without_ties_and_ignore_units() -> None:
    scores = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert torch.allclose(win_rates(scores, mask).sum(1), torch.full((3,), 2.0))
    stretched = scores.clone()
    stretched[1] = torch.exp(7 * scores[1]) - 100
    assert torch.equal(win_rates(stretched, mask), win_rates(scores, mask))


# The step


def test_the_start_is_log_2_times_the_weights(tiny_family: Families) -> None:
    """phi = (1, 2/3, 1/3, 0): weights sum to 1.832461."""
    family = tiny_family("sd1")
    made = replace(ranked_batch(2), scores={"one": torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])})
    out = trainer(family, lora_policy(family)).training_step(made, context())
    assert out.loss.item() == pytest.approx(1.832461 * math.log(2), rel=1e-5)
    assert out.metrics["accuracy"] == out.metrics["list_accuracy"] == 0.5


def test_pictures_of_a_list_share_timestep_and_noise(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    shared = list_inputs(family, ranked_batch(2, absent=((0, 2),)), context(), share_noise=True)
    assert shared.place.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert len(shared.t[:3].unique()) == len(shared.t[3:].unique()) == 1 and shared.t[0] != shared.t[3]
    assert torch.equal(shared.gaussian[0], shared.gaussian[2]) and not torch.equal(shared.gaussian[0], shared.gaussian[3])
    own = list_inputs(family, ranked_batch(2), context(), share_noise=False)
    assert not torch.equal(own.gaussian[0], own.gaussian[1]) and own.t[0] == own.t[3]


def test_less_memory_gives_equal_gradients(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    policy = lora_policy(family, moved=0.02)
    made = ranked_batch(2, absent=((1, 0),))
    found = []
    for size in (0, 1, 3):
        out = trainer(family, policy, beta=50.0, images_per_forward=size).training_step(made, context())
        out.loss.backward()
        found.append((out.loss.item(), gradients(policy)))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        largest = max(value.abs().max().item() for value in found[0][1].values())
        assert largest > 0
        for name, value in gradient.items():
            assert torch.allclose(value, found[0][1][name], atol=2e-5 * largest), name


def test_less_memory_under_data_parallelism(tiny_family: Families, tmp_path: Path) -> None:
    """A data-parallel module allows one forward a backward pass; two steps show that it is ready again after each."""
    family = tiny_family("sd1")
    policy = lora_policy(family, moved=0.02)
    made = ranked_batch(1)
    trainer(family, policy, beta=50.0).training_step(made, context()).loss.backward()
    wanted = gradients(policy)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(policy)
        method = trainer(family, policy, beta=50.0, images_per_forward=1)
        method.policy = wrapped
        for _ in range(2):
            method.training_step(made, context()).loss.backward()
            found = gradients(policy)
            largest = max(value.abs().max().item() for value in wanted.values())
            assert all(torch.allclose(value, wanted[name], atol=2e-5 * largest) for name, value in found.items())
    finally:
        torch.distributed.destroy_process_group()


def test_an_absent_picture_is_never_looked_at(tiny_family: Families) -> None:
    """What lies in its place, NaN included, changes nothing; a list without it gives the same."""
    family = tiny_family("sd1")
    policy = lora_policy(family, moved=0.02)
    made = ranked_batch(1, width=4, absent=((0, 3),))
    assert made.images.pixels is not None
    poisoned = made.images.pixels.clone()
    poisoned[3] = torch.nan
    one = trainer(family, policy).training_step(made, context()).loss
    two = trainer(family, policy).training_step(replace(made, images=replace(made.images, pixels=poisoned)), context()).loss
    short = trainer(family, policy).training_step(ranked_batch(1, width=3), context()).loss
    assert one.item() == two.item() == pytest.approx(short.item(), rel=1e-5)


def test_a_batch_is_the_mean_of_its_lists_and_equal_scores_teach_nothing(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    policy = lora_policy(family, moved=0.02)
    method, made = trainer(family, policy), ranked_batch(2)
    assert made.images.pixels is not None
    parts = []
    for row in range(2):
        rows = slice(4 * row, 4 * row + 4)
        geometry = made.images.geometry
        cut = Geometry(original=geometry.original[rows], crop=geometry.crop[rows], target=geometry.target[rows])
        parts.append(
            replace(made, ids=made.ids[row : row + 1], prompts=made.prompts[row : row + 1], mask=made.mask[row : row + 1],
                    images=Side(geometry=cut, pixels=made.images.pixels[rows]), weight=torch.ones(1),
                    scores={name: value[row : row + 1] for name, value in made.scores.items()})
        )  # fmt: skip
    alone = [method.training_step(part, context()).loss.item() for part in parts]
    assert method.training_step(made, context()).loss.item() == pytest.approx(sum(alone) / 2, rel=1e-4)
    level = replace(made, scores={name: torch.ones_like(value) for name, value in made.scores.items()})
    out = method.training_step(level, context())
    out.loss.backward()
    assert out.loss.item() == 0 and all(value.abs().max() == 0 for value in gradients(policy).values())


def test_rewards_that_are_not_there(tiny_family: Families) -> None:
    family = tiny_family("sd1")
    with pytest.raises(ConfigError, match=r"no scores of 'frist'; did you mean 'first'"):
        trainer(family, lora_policy(family), rewards=("frist",)).training_step(ranked_batch(1), context())
    with pytest.raises(ConfigError, match="mmalign annotate"):
        trainer(family, lora_policy(family)).training_step(replace(ranked_batch(1), scores={}), context())
    with pytest.raises(ValidationError, match="exactly one reward"):
        RankDPOConfig(utilities="scores")


# A run


def write_lists(folder: Path, number: int = 6, width: int = 3, broken: tuple[tuple[int, int], ...] = ()) -> Path:
    """A ranked table with scores of one reward."""
    folder.mkdir(parents=True)
    rows = []
    for row in range(number):
        images = []
        for place in range(width if row else width - 1):  # the first list is shorter
            pixels = np.random.default_rng(100 * row + place).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            images.append({"bytes": b"no picture" if (row, place) in broken else buffer.getvalue(), "path": None})
        scores = {"taste": [float((row + 2 * place) % 5) for place in range(len(images))]}
        rows.append({"id": f"list-{row}", "prompt": PROMPTS[row % 2], "images": images, "scores": scores})
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-00000.parquet")
    return folder


def run(model: Path, manifest: Path, out: Path, *more: str) -> list[dict[str, float]]:
    from mmalign.experiment import train

    root = Path(__file__).resolve().parents[2]
    train(
        root / "configs" / "tiny" / "rank_dpo.yaml",
        [f"model.path={model}", f"data.manifest={manifest}", f"run.out={out}", "optim.steps=3", "optim.warmup_steps=0",
         "optim.batch_size=2", "run.log_every=1", "run.save_every=3", "evaluate.prompts=null", "evaluate.rewards=[]",
         "evaluate.holdout=[]", "data.max_bad_fraction=0.5", *more],
    )  # fmt: skip
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_from_a_ranked_table_with_and_without_caches(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    manifest = write_lists(tmp_path / "lists", broken=((2, 1),))
    cached = run(tiny_folder("sd1"), manifest, tmp_path / "cached")
    plain = run(tiny_folder("sd1"), manifest, tmp_path / "plain", "data.cache=off", "data.workers=0")
    assert [line["step"] for line in cached] == [1, 2, 3]
    for one, two in zip(cached, plain, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["list_accuracy"] == pytest.approx(two["list_accuracy"])
    listed = (tmp_path / "cached" / "quarantine.jsonl").read_text().splitlines()
    assert len(listed) == 1 and json.loads(listed[0])["column"] == "images[1]"
    summary = json.loads((tmp_path / "cached" / "summary.json").read_text())
    assert summary["method"] == "rank_dpo" and summary["samples_quarantined"] == 1


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_table_of_pairs_is_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"id": "a", "prompt": "b", "chosen": "c.png", "rejected": "d.png"}\n')
    with pytest.raises(DataError, match="it is a table of pairs; a method on lists needs several pictures a prompt"):
        run(tiny_folder("sd1"), tmp_path / "pairs.jsonl", tmp_path / "out")


@pytest.mark.usefixtures("fresh_accelerate")
def test_checked_and_trusted_tables_give_the_same_steps(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The kinds of `data.check` differ in who looked at the pictures, and in nothing that is learned."""
    manifest = write_lists(tmp_path / "lists")
    with pytest.raises(DataError, match="has not been checked; run 'mmalign data check"):
        run(tiny_folder("sd1"), manifest, tmp_path / "unchecked", "data.check=required")
    check_any(manifest, policy=CheckPolicy(), progress=False)
    required = run(tiny_folder("sd1"), manifest, tmp_path / "required", "data.check=required")
    trusted = run(tiny_folder("sd1"), manifest, tmp_path / "trusted", "data.check=off", "data.cache=off", "data.workers=0")
    for one, two in zip(required, trusted, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
