"""What an experiment names and is not there: said at once, with what makes it, before a folder of the run exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.config.othernames import OTHER_NAMES
from mmalign.config.schema import field_annotation, section_of
from mmalign.errors import ConfigError
from mmalign.experiment import check, load_experiment, train
from mmalign.experiment.settings import ExperimentConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny"


@pytest.mark.parametrize(
    ("file", "overrides", "messages"),
    [
        ("diffusion_orpo", [],
         ["data.manifest: no file or folder 'runs/demo/data/pairs'", "'mmalign demo --method diffusion_orpo' makes it"]),
        ("temple", [], ["'mmalign demo --method temple' makes it"]),
        ("vlm_list", [], ["'mmalign generate configs/generate/tiny_candidates.yaml' makes it"]),
        ("diffusion_dpo", ["data.manifest=data/mien"], ["'data/mien'", "did you mean 'data/mine'?", "'mmalign data import'"]),
        ("diffusion_dpo", ["data.manifest=data/mine", "data.mix=[data/other]"], ["data.mix: no file or folder 'data/other'"]),
        ("diffusion_dpo", ["data.manifest=data/mine", "evaluate.holdout=[tiny-juge]"],
         ["evaluate.holdout: reward 'tiny-juge' is not known; did you mean 'tiny-judge'?"]),
        ("diffusion_dpo", ["data.manifest=data/mine", "model.path=models/sd/15"], ["model.path: no folder 'models/sd/15'"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [train, check])
def test_what_is_missing_is_named_with_what_makes_it(
    command: object, file: str, overrides: list[str], messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        command(TINY / f"{file}.yaml", overrides)  # type: ignore[operator]
    for message in messages:
        assert message in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_shipped_experiments_find_embedded_files_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_experiment(TINY / "freeze_as_guard.yaml").config
    assert Path(config.model.model_dump()["path"]).samefile(ROOT / "assets" / "tiny-sd")
    assert Path(config.data.manifest).samefile(ROOT / "assets" / "tiny-domains")
    with pytest.raises(ConfigError, match="model.path: the embedded asset 'tiny-sdd' is not in"):
        load_experiment(TINY / "freeze_as_guard.yaml", ["model.path=assets/tiny-sdd"])


@pytest.mark.parametrize("dotted", sorted(set(OTHER_NAMES.values()) - {"--resume"}))
def test_what_other_tools_call_differently_exists_here(dotted: str) -> None:
    section, _, leaf = dotted.partition(".")
    model, choice = section_of(field_annotation(ExperimentConfig.model_fields[section]), {})
    models = [choice.resolve(name) for name in choice.registry.names()] if choice is not None else [model]
    assert any(leaf in found.model_fields for found in models if found is not None), dotted
