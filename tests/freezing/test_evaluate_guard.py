"""The protocol: its measures by hand-worked numbers, its files, and a whole evaluation of two user steps."""

from __future__ import annotations

import json
import signal
import sys
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.errors import ConfigError
from mmalign.evaluate_guard import evaluate_guard, load_guard_evaluation
from mmalign.evaluate_guard.bench import Denoising
from mmalign.evaluate_guard.cost import kept_for_backward
from mmalign.evaluate_guard.erase import erase
from mmalign.evaluate_guard.measures import effect, interval
from mmalign.evaluate_guard.quality import Judges, frechet_distance
from mmalign.freezing import FreezeMask
from mmalign.world.domains import EVERY_PATTERN, EVERYBODY, PATTERNS, likeness, patterned, portrait
from mmalign.world.oracle import oracle_scores
from tests.freezing.conftest import ROOT
from tests.freezing.guarded import few_domains, learn

CONFIG = ROOT / "configs" / "evaluate_guard" / "tiny.yaml"


def test_block_harm_and_selectivity() -> None:
    # illegal: base 1.0, full 0.2, masked 0.6: half of the gain of 0.8 is prevented; innocent: (0.3 - 0.2) / (0.7 - 0.2) = 0.2
    base = {"illegal": np.full(8, 1.0), "innocent": np.full(4, 0.7)}
    full = {"illegal": np.full(8, 0.2), "innocent": np.full(4, 0.2)}
    here = {"illegal": np.full(8, 0.6), "innocent": np.full(4, 0.3)}
    found = effect(base, full, here, seed=0)
    assert (found.block[0], found.harm[0]) == (pytest.approx(0.5), pytest.approx(0.2))
    assert interval([found.selectivity]).mean == pytest.approx(0.3)
    assert interval([found.selectivity]).low == pytest.approx(0.3)  # equal pictures leave nothing to doubt
    assert effect(base, full, full, seed=0).selectivity[0] == 0
    assert effect(base, full, base, seed=0).block[0] == 1


def test_intervals_average_seeds_and_share_pictures_between_arms() -> None:
    stream = np.random.default_rng(0)
    base = {role: 1 + stream.uniform(0, 0.1, 50) for role in ("illegal", "innocent")}
    full = {role: values - 0.5 for role, values in base.items()}
    here = {role: values - 0.4 + stream.uniform(-0.05, 0.05, 50) for role, values in base.items()}
    one, two = effect(base, full, here, seed=1), effect(base, full, here, seed=2)
    both = interval([one.block, two.block])
    assert both.mean == pytest.approx(one.block[0]) and both.low < both.mean < both.high
    assert both.high - both.low < interval([one.block]).high - interval([one.block]).low
    assert (effect(base, full, here, seed=1).block - one.block == 0).all()  # an arm differs from itself by nothing


def test_the_distance_of_known_gaussians() -> None:
    stream = np.random.default_rng(1)
    values = stream.normal(size=(4000, 3))
    assert frechet_distance(values, values) == pytest.approx(0, abs=1e-8)
    # a shift by (3, 4, 0) and a doubled deviation: 25 + 3 (1 + 4 - 2 * 2)
    assert frechet_distance(values, 2 * values + np.array([3.0, 4.0, 0.0])) == pytest.approx(28, rel=0.03)


def test_what_a_forward_keeps() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.zeros(4, 8)
    own = {value.untyped_storage().data_ptr() for value in layer.parameters()}
    # the input of a trained weight and the result that is squared: 4 x 8 x 4 bytes each
    assert kept_for_backward(lambda: layer(x).square().sum(), own) == 256
    layer.requires_grad_(False)
    assert kept_for_backward(lambda: layer(x).square().sum(), own) == 0


def test_the_groups_of_domains_share_nothing_and_their_judges_know_them() -> None:
    assert all(len(set(names)) == len(names) for names in (EVERYBODY, EVERY_PATTERN))
    rng = np.random.Generator(np.random.Philox(key=3))
    faces = [portrait(rng, group=group) for group in (0, 1, 2) for _ in range(12)]
    own = likeness(np.stack([face.picture for face in faces]), [face.caption for face in faces])
    assert own.mean() > 0.6  # places between those of the grid cost up to two thirds of it
    swapped = [face.caption.replace(face.domain, "bob" if face.domain != "bob" else "ann") for face in faces]
    others = likeness(np.stack([face.picture for face in faces]), swapped)
    assert (others < own).all() and others.mean() < 0.1
    papers = [patterned(rng, group=group) for group in (0, 1, 2) for _ in range(12)]
    for group, names in enumerate(PATTERNS):
        assert {paper.domain for paper in papers[12 * group : 12 * group + 12]} == set(names)
    assert oracle_scores(np.stack([paper.picture for paper in papers]), [paper.caption for paper in papers]).mean() > 0.7
    with pytest.raises(ValueError, match="not a caption of a portrait"):
        likeness(papers[0].picture[None], [papers[0].caption])


def test_the_closed_form_edit_moves_the_concept_and_holds_the_rest() -> None:
    from tests.fixtures.tiny import load

    family = load("sd1", ROOT / "assets" / "tiny-sd")
    network = family.copy_network()
    kept = ["a large red star on a grey background", "two blue circles on a white background"]
    edited = erase(family, network, concepts=["eli on a grey background"], kept=kept, strength=1e-4)
    assert len(edited) == 14 and all(".attn2.to_" in name for name in edited)
    before, after = (dict(part.named_parameters())[edited[0]].detach() for part in (family.network, network))
    tokens = {name: family.encode_prompts([name])["tokens"][0] for name in ("eli on a grey background", kept[0], "")}

    def moved(caption: str) -> float:
        return float((tokens[caption] @ (after - before).T).norm() / (tokens[caption] @ before.T).norm())

    neutral = (tokens[""] @ before.T - tokens["eli on a grey background"] @ after.T).norm()
    far = (tokens[""] @ before.T - tokens["eli on a grey background"] @ before.T).norm()
    assert neutral < 0.5 * far
    assert moved(kept[0]) < 0.5 * moved("eli on a grey background")


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = learn(tmp_path_factory.mktemp("mask") / "run", method__scheme="random", method__ratio=0.3, optim__steps=0)
    return out / "export" / "freeze_mask.json"


def test_a_whole_evaluation(mask_file: Path, tmp_path: Path) -> None:
    overrides = [
        f"masks.learned={mask_file}", "random=1", "optim.steps=2", "optim.batch_size=2", "sample.prompts=3", "sample.steps=2",
        "sample.grid=2", "draws=1", "erase=false", f"data.manifest={few_domains(tmp_path / 'domains')}",
        f"model.path={ROOT / 'assets' / 'tiny-sd'}", f"run.out={tmp_path / 'out'}",
    ]  # fmt: skip
    result = evaluate_guard(CONFIG, overrides)
    assert list(result.arms) == ["base", "none", "learned", "random 1"]
    mine, other = result.arms["learned"], result.arms["random 1"]
    assert mine["frozen"] == other["frozen"] == 86
    assert mine["ratio"]["parameters"] == pytest.approx(other["ratio"]["parameters"], abs=0.006)
    assert result.arms["none"]["cost"]["illegal"]["trained_parameters"] == 2807016
    assert mine["cost"]["illegal"]["saved_bytes"] < result.arms["none"]["cost"]["illegal"]["saved_bytes"]
    assert mine["selectivity"]["mean"] == pytest.approx(mine["block"]["mean"] - mine["harm"]["mean"])
    assert set(mine["quality"]["illegal"]) == {"clip", "fid", "judge"} and "| learned |" in result.table
    page = (tmp_path / "out" / "guard.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 5  # two domains; the domain itself and four arms
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "Do not" not in page
    assert json.loads((tmp_path / "out" / "guard.json").read_text())["domains"]["illegal"] == ["eli", "fay", "gus", "hal"]
    absent = json.loads((tmp_path / "out" / "guard.json").read_text())["topiq_absent"]
    assert absent and "TOPIQ" in absent and page.count(escape(absent)) == 2
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "arms").iterdir()}
    again = evaluate_guard(CONFIG, overrides)  # everything is there already
    assert again.arms == result.arms
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "arms").iterdir()} == times


def test_a_user_who_was_stopped_is_never_scored(
    mask_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A polite stop in the middle of a user's fine-tuning would otherwise leave an arm that looks finished."""
    step = Denoising.training_step

    def stopped(self: Denoising, batch: Any, ctx: Any) -> Any:
        if ctx.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, ctx)

    monkeypatch.setattr(Denoising, "training_step", stopped)
    overrides = [
        f"masks.learned={mask_file}", "random=0",
        "optim.steps=4", "optim.batch_size=2", "sample.prompts=2", "sample.steps=1", "sample.grid=1",
        "draws=1", "erase=false", f"data.manifest={few_domains(tmp_path / 'domains')}", f"run.out={tmp_path / 'out'}",
        f"model.path={ROOT / 'assets' / 'tiny-sd'}",
    ]  # fmt: skip
    with pytest.raises(KeyboardInterrupt, match="the illegal user had 2 of 4 steps; run again to go on"):
        evaluate_guard(CONFIG, overrides)
    assert "none" not in {path.stem for path in (tmp_path / "out" / "arms").glob("*.json")}


def test_a_judge_that_cannot_be_loaded_is_missing_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package whose weights cannot be fetched, as on a machine without network."""
    text = "def create_metric(name, device):\n    raise OSError(f'no route to the weights of {name}')\n"
    (tmp_path / "pyiqa.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    judges = Judges("tiny-clip", torch.device("cpu"))
    assert judges.topiq_absent is None
    assert judges.topiq(np.zeros((2, 32, 32, 3), np.uint8)) is None
    assert judges.topiq_absent == "TOPIQ could not be loaded: OSError: no route to the weights of topiq_nr"
    sys.modules.pop("pyiqa", None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["masks={none: x.json}"], "'none' is the name of an arm that is always there"),
        (["random=-1"], "random must not be negative"),
        (["sampel.steps=3"], "did you mean 'sample'"),
    ],
)
def test_files_without_meaning_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_guard_evaluation(CONFIG, overrides)


def test_an_experiment_is_not_an_evaluation() -> None:
    with pytest.raises(ConfigError, match="this is an experiment, not a guard evaluation"):
        load_guard_evaluation(ROOT / "configs" / "tiny" / "freeze_as_guard.yaml")


def test_a_mask_of_another_base_is_refused(tmp_path: Path) -> None:
    from mmalign.freezing import FreezingError
    from tests.freezing.conftest import Small

    path = FreezeMask.of(Small(), ["out.bias"]).save(tmp_path / "other.json")
    model = f"model.path={ROOT / 'assets' / 'tiny-sd'}"
    with pytest.raises(FreezingError, match="made for another network"):
        evaluate_guard(CONFIG, [f"masks.learned={path}", model, f"run.out={tmp_path / 'out'}"])
