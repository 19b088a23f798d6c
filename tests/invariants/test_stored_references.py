"""A precomputed reference is the live reference on the same draws, and needs neither its pass nor its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from mmalign.errors import ConfigError, DataError
from mmalign.experiment.settings import load_experiment
from mmalign.models.diffusion.base import DiffusionFamily
from mmalign.models.diffusion.sd import StableDiffusion
from tests.invariants.conftest import CONFIG, metric_lines, settings, state_files, write_pairs

SCORES = ("loss", "margin", "policy_chosen", "policy_rejected", "chosen_drift", "rejected_drift")
DRAWN: dict[str, object] = {"data__draws": 2, "data__drop_caption": 0.3, "data__flip": True, "optim__batch_size": 4,
                           "optim__steps": 5}  # fmt: skip
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs with caches of their own, so that steps of 4 pairs begin the second draw at step 4."""
    return write_pairs(tmp_path_factory.mktemp("stored") / "pairs", 12)


@pytest.mark.parametrize(("tuning", "live"), [("lora", "adapter_off"), ("full", "copy")])
def test_it_equals_the_live_reference_on_the_same_draws(
    train: Train, table: Path, tmp_path: Path, tuning: str, live: str
) -> None:
    # With the usual eps Adam steps on gradients that are rounding, and two equal runs part.
    same = {**DRAWN, "pairs": table, "tuning__name": tuning, "optim__eps": 1e-3, "run__save_every": 5}
    stored = metric_lines(train(tmp_path / "stored", reference__name="precomputed", **same))
    asked = metric_lines(train(tmp_path / "asked", reference__name=live, **same))
    assert len(stored) == len(asked) == 5
    for ours, theirs in zip(stored, asked, strict=True):
        for name in SCORES:
            assert ours[name] == pytest.approx(theirs[name], rel=0, abs=1e-5), (ours["step"], name)
    assert len({line["policy_chosen"] for line in stored}) == 5


def test_no_reference_is_asked_while_training(
    train: Train, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"pairs": table, "reference__name": "precomputed", **DRAWN, "run__save_every": 5}
    train(tmp_path / "first", **more)  # fills
    calls: list[int] = []
    predict = StableDiffusion.predict

    def counted(self: DiffusionFamily, module: nn.Module, noisy: object, *rest: object) -> object:
        calls.append(len(noisy))  # type: ignore[arg-type]
        return predict(self, module, noisy, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(StableDiffusion, "predict", counted)
    train(tmp_path / "again", **more)
    assert calls == [8] * 5  # the policy on four pairs a step, and nothing else


def test_draws_come_round(train: Train, table: Path, tmp_path: Path) -> None:
    """With a rate of zero a loss depends on the draw alone: 12 pairs x 2 draws are 6 steps of 4 pairs."""
    run = train(
        tmp_path / "run", pairs=table, reference__name="precomputed", data__draws=2, data__shuffle=False,
        optim__batch_size=4, optim__steps=12, optim__lr=0.0, run__save_every=12,
    )  # fmt: skip
    drawn = [line["policy_chosen"] for line in metric_lines(run)]
    assert drawn[:6] == drawn[6:] and len(set(drawn[:6])) == 6


def test_it_goes_on_bit_for_bit(train: Train, table: Path, tmp_path: Path) -> None:
    more = {"pairs": table, "reference__name": "precomputed", **DRAWN}
    straight = train(tmp_path / "straight", **more)
    parted = train(tmp_path / "parted", **more)
    for step in (4, 5):
        shutil.rmtree(parted / "checkpoints" / f"step-{step:08d}")
    train(parted, resume=True, **more)
    assert state_files(parted, 5) == state_files(straight, 5)


def test_other_weights_have_other_scores(train: Train, table: Path, tmp_path: Path) -> None:
    source = Path(load_experiment(CONFIG).config.model.model_dump()["path"])
    changed = tmp_path / "model"
    shutil.copytree(source, changed)
    scheduler = changed / "scheduler" / "scheduler_config.json"
    values = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**values, "beta_end": 0.011}))
    folders = table.parent / "cache" / "referr"
    more = {"pairs": table, "reference__name": "precomputed", "data__draws": 1, "optim__steps": 1}
    train(tmp_path / "a", **more)
    before = set(folders.iterdir())
    train(tmp_path / "b", model__path=changed, **more)
    assert len(set(folders.iterdir()) - before) == 1
    train(tmp_path / "c", model__path=changed, **more)  # found, not made again
    assert len(set(folders.iterdir()) - before) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method__name": "ddim_inpo"}, "reference.name: 'ddim_inpo' asks its reference at every step"),
        ({"data__draws": 0}, "data.draws: 'reference: precomputed' stores the scores of stored draws; set at least 1"),
        ({"data__draws": -1}, "data.draws: must be at least 0, got -1"),
        ({"data__cache": "off"}, "data.cache: 'reference: precomputed' is a cache; use auto or a folder"),
    ],
)
def test_what_does_not_go_together_is_said(table: Path, tmp_path: Path, more: dict[str, object], message: str) -> None:
    values = settings(table, tmp_path, reference__name="precomputed", **{"method__name": "diffusion_dpo", **more})
    with pytest.raises(ConfigError) as caught:
        load_experiment(CONFIG, values)
    assert any(problem.startswith(message) for problem in caught.value.problems), caught.value.problems


def test_a_weight_that_is_not_finite_is_named(train: Train, table: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = Path(load_experiment(CONFIG).config.model.model_dump()["path"])
    broken = tmp_path / "model"
    shutil.copytree(source, broken)
    weights = next((broken / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["conv_out.bias"].fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match="the reference's error is not finite for 12 draws, first of row 'row-0'"):
        train(tmp_path / "run", pairs=table, model__path=broken, reference__name="precomputed", data__draws=1)
