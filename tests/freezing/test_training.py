"""The `freezing` section with our trainers: frozen tensors bit-identical in every combination, tampering named on load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from mmalign.errors import ConfigError, ModelError
from mmalign.experiment import load_experiment, open_run
from mmalign.experiment import train as run_training
from mmalign.freezing import FreezeMask, FreezingError, guard, verify
from mmalign.freezing.guarding import guard_of
from mmalign.trainers import METHODS
from tests.forks import launched
from tests.freezing.conftest import ROOT
from tests.freezing.guarded import BASE, learn
from tests.invariants.conftest import settings, state_files

Train = Callable[..., Path]
SFT = str(ROOT / "configs" / "tiny" / "diffusion_sft.yaml")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other tensor of the embedded model frozen, and with them half of the attention layers."""
    out = learn(tmp_path_factory.mktemp("mask") / "run", method__scheme="random", method__ratio=0.5, optim__steps=0)
    return out / "export" / "freeze_mask.json"


def same_bits(mask: FreezeMask, export: Path) -> list[str]:
    """Frozen tensors of an exported pipeline that are not, bit for bit, what the embedded file holds in float32."""
    base, found = load_file(BASE / WEIGHTS), load_file(export / WEIGHTS)
    return [name for name in mask.frozen if base[name].float().numpy().tobytes() != found[name].numpy().tobytes()]


def moved(mask: FreezeMask, export: Path) -> list[str]:
    base, found = load_file(BASE / WEIGHTS), load_file(export / WEIGHTS)
    return [name for name in base if name not in mask.frozen and not base[name].float().equal(found[name])]


def test_full_training_with_accumulation_average_and_decay(train: Train, mask_file: Path, tmp_path: Path) -> None:
    run = train(
        tmp_path / "run", config=SFT, freezing__mask=mask_file, optim__accumulate=2, optim__weight_decay=0.1, optim__steps=4,
        freezing__verify_every=2,
    )  # fmt: skip
    mask = FreezeMask.load(mask_file)
    assert verify(mask, run / "export").intact and same_bits(mask, run / "export") == []
    assert len(moved(mask, run / "export")) == 286 - len(mask.frozen)  # every free tensor moved
    assert FreezeMask.load(run / "export") == mask  # the mask travels with the weights
    assert set(load_file(run / "checkpoints/step-00000004/policy.safetensors")) == set(mask.tensors) - set(mask.frozen)
    assert set(load_file(run / "checkpoints/step-00000004/average.safetensors")) == {
        f"shadow/{name}" for name in set(mask.tensors) - set(mask.frozen)
    }
    opened = open_run(run)
    held = guard_of(opened.aligned)
    assert held is not None and held.verify().intact


def test_resume_keeps_them_and_is_the_straight_run(train: Train, mask_file: Path, tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", config=SFT, freezing__mask=mask_file, optim__steps=4)
    halves = tmp_path / "halves"
    shutil.copytree(straight, halves)
    shutil.rmtree(halves / "checkpoints" / "step-00000004")
    train(halves, resume=True, config=SFT, freezing__mask=mask_file, optim__steps=4)
    assert state_files(halves, 4) == state_files(straight, 4)
    assert same_bits(FreezeMask.load(mask_file), halves / "export") == []


def test_adapters_stay_off_frozen_layers(train: Train, mask_file: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", config=SFT, freezing__mask=mask_file, tuning="{name: lora, rank: 2}", optim__steps=2)
    mask = FreezeMask.load(mask_file)
    layers = {name.split(".lora")[0].removeprefix("unet.") for name in load_file(run / "export/pytorch_lora_weights.safetensors")}
    candidates = {name.removesuffix(".weight") for name in mask.tensors if ".attn" in name and name.endswith("weight")}
    assert layers == {name for name in candidates if f"{name}.weight" not in mask.frozen}
    assert 0 < len(layers) < len(candidates)
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32, safety_checker=None)
    pipeline.load_lora_weights(run / "export")  # nothing missing, nothing left over
    assert verify(mask, pipeline.unet).intact
    merged = tmp_path / "merged"
    from mmalign.export import export_run

    export_run(run, "diffusers", merged)
    assert same_bits(mask, merged) == []


def test_two_processes(pairs: Path, mask_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    launched(2, run_training, SFT, settings(pairs, out, optim__steps=2, freezing__mask=mask_file))
    mask = FreezeMask.load(mask_file)
    assert same_bits(mask, out / "export") == [] and len(moved(mask, out / "export")) == 286 - len(mask.frozen)


PAIRS = [
    name for name in METHODS.names()
    if (ROOT / "configs" / "tiny" / f"{name}.yaml").is_file() and METHODS.get(name).batches == "pairs"
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "diffusion_sft"])
def test_every_method_on_pairs(name: str, train: Train, pairs: Path, mask_file: Path, tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "tiny" / f"{name}.yaml")
    more = {"data__ties": "drop", "run__save_every": 1, "optim__steps": 1, "tuning": "{name: full}", "optim__ema_decay": 0.0}
    if name == "smpo":
        more["method__labels"] = "p_chosen"  # the little table holds no scores
    if name == "personalized_dpo":  # whose pairs have a user
        rows = [json.loads(line) | {"user": "ann"} for line in pairs.read_text().splitlines()]
        owned = pairs.with_name("with_users.jsonl")
        owned.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = owned if name == "personalized_dpo" else pairs
    run = train(tmp_path / "run", config=config, freezing__mask=mask_file, pairs=table, **more)
    mask = FreezeMask.load(mask_file)
    assert same_bits(mask, run / "export") == []
    assert moved(mask, run / "export")


LISTS = [name for name in METHODS.names() if METHODS.get(name).batches == "lists"]
@pytest.mark.parametrize("name", LISTS)
def test_every_method_on_lists(name: str, train: Train, mask_file: Path, tmp_path: Path) -> None:
    generator, lines = np.random.default_rng(0), []
    for row in range(4):
        files = [f"{row}-{rank}.png" for rank in range(3)]
        for file in files:
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / file)
        lines.append(json.dumps({"id": str(row), "prompt": "a red circle", "images": files, "scores": {"tiny-clip": [3, 2, 1]}}))
    (tmp_path / "lists.jsonl").write_text("\n".join(lines))
    more = {"run__save_every": 1, "optim__steps": 1, "tuning": "{name: full}", "optim__ema_decay": 0.0, "data__workers": 1}
    config = str(ROOT / "configs" / "tiny" / f"{name}.yaml")
    run = train(tmp_path / "run", config=config, pairs=tmp_path / "lists.jsonl", freezing__mask=mask_file, **more)
    mask = FreezeMask.load(mask_file)
    assert same_bits(mask, run / "export") == [] and moved(mask, run / "export")


ON_ANSWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vlm_pairs": ("pairs", {}),
    "vlm_chosen": ("pairs", {}),
    "vlm_labelled": ("unpaired", {}),
    "vlm_lists": ("lists", {}),
    "vlm_triples": ("pairs", {"reference": "a gold star"}),
    "vlm_joint": ("pairs", {}),
    "vlm_answered": ("pairs", {}),
    "vlm_records": ("pairs", {}),
    "vlm_stages": ("pairs", {"stage": "easy"}),
}
"""What a method on answers reads -> the little table that has it, with further columns."""
SETTINGS: dict[str, dict[str, Any]] = {
    "vlm_online_dpo": {"judge": "verbosity", "max_new_tokens": 12, "samples": 3, "offline": 0.5},
    "bdhs_dpo": {"max_new_tokens": 6},
    "temple": {"stages": [{"name": "easy", "rows": "easy", "steps": 1}, {"name": "again", "rows": "easy", "steps": 1}]},
}


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FreezeMask]:
    """A vision-language model, and a mask over every other one of its matrices."""
    import torch

    from mmalign.experiment.opening import load_any
    from mmalign.freezing.names import published
    from tests.fixtures import tiny_vlm
    from tests.fixtures.vlm_runs import write_experiment, write_table

    folder = tmp_path_factory.mktemp("answers")
    tiny_vlm.build("llava", folder / "llava")
    file = write_experiment(folder, folder / "llava", write_table(folder))
    base = load_any(load_experiment(file).config, torch.device("cpu")).network
    mask = FreezeMask.of(base, [key for key, value in published(base).items() if value.ndim > 1][::2])
    mask.save(folder / "freeze_mask.json")
    return folder, mask


@pytest.mark.parametrize("name", [name for name in METHODS.names() if METHODS.get(name).batches.startswith("vlm_")])
def test_every_method_on_answers(name: str, answering: tuple[Path, FreezeMask], tmp_path: Path) -> None:
    """Whole weights are trained, so that anything not frozen could move, and everything frozen is hashed in the opened run."""
    from mmalign.experiment import train as run_training
    from mmalign.freezing.names import published
    from tests.fixtures.vlm_runs import write_experiment, write_table

    world, mask = answering
    kind, columns = ON_ANSWERS[METHODS.get(name).batches]
    method = {"name": name, **SETTINGS.get(name, {})}
    steps = sum(stage["steps"] for stage in method.get("stages", [{"steps": 2}]))
    file = write_experiment(
        tmp_path, world / "llava", write_table(tmp_path, kind, **columns), method=method, optim={"steps": steps},
        tuning={"name": "full"},
    )  # fmt: skip
    run_training(file, [f"freezing.mask={world / 'freeze_mask.json'}"])
    opened = open_run(tmp_path / "run")
    held = guard_of(opened.aligned)
    assert held is not None and held.verify().intact and held.verify().checked == len(mask.frozen)
    assert len(mask.changed(published(opened.aligned), names=tuple(mask.tensors))) > 0  # and something free has moved


def test_tampering_with_the_base_is_named(train: Train, mask_file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "tampered"
    shutil.copytree(BASE, bad)
    name = FreezeMask.load(mask_file).frozen[3]
    state = load_file(bad / WEIGHTS)
    state[name] = state[name] + 0.25
    save_file(state, bad / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(FreezingError, match=f"not the base of the mask: 1 of 143 frozen tensors changed: '{name}'"):
        train(tmp_path / "run", config=SFT, freezing__mask=mask_file, model__path=bad)
    # a free tensor may differ: an honest fine-tune can be continued
    state = load_file(BASE / WEIGHTS)
    free = next(key for key in state if key not in FreezeMask.load(mask_file).frozen)
    state[free] = state[free] + 0.25
    save_file(state, bad / WEIGHTS, metadata={"format": "pt"})
    train(tmp_path / "next", config=SFT, freezing__mask=mask_file, model__path=bad, optim__steps=1)


def test_tampering_with_a_checkpoint_is_refused(train: Train, mask_file: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", config=SFT, freezing__mask=mask_file, optim__steps=2)
    name = FreezeMask.load(mask_file).frozen[0]
    path = run / "checkpoints/step-00000002/policy"
    state = load_file(path.with_suffix(".safetensors"))
    import json

    skeleton = json.loads(path.with_suffix(".json").read_text())
    state[name] = load_file(BASE / WEIGHTS)[name].float() + 1
    skeleton["__items__"].append([name, {"__tensor__": name}])
    save_file(state, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(skeleton))
    with pytest.raises(ModelError, match=f"does not fit what is trained now, e.g. '{name}'"):
        open_run(run)


def test_exported_weights_that_changed_are_detected(train: Train, mask_file: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", config=SFT, freezing__mask=mask_file, optim__steps=1)
    mask = FreezeMask.load(mask_file)
    path = run / "export" / WEIGHTS
    state = load_file(path)
    state[mask.frozen[5]] += 1e-3
    save_file(state, path, metadata={"format": "pt"})
    found = verify(mask, run / "export")
    assert found.changed == (mask.frozen[5],)
    with pytest.raises(FreezingError, match="somebody's fine-tune: 1 of 143 frozen tensors changed"):
        found.require("somebody's fine-tune")
    from diffusers import UNet2DConditionModel

    with pytest.raises(FreezingError, match=mask.frozen[5]):
        guard(UNet2DConditionModel.from_pretrained(run / "export" / "unet"), mask)


def test_a_mask_that_is_missing_or_freezes_everything_is_an_error(train: Train, tmp_path: Path) -> None:
    with pytest.raises(FreezingError, match="no file"):
        train(tmp_path / "run", config=SFT, freezing__mask=tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="mask must name a file"):
        load_experiment(SFT, ["freezing.mask='  '"])
    everything = learn(tmp_path / "all", method__scheme="random", method__ratio=1.0, optim__steps=0) / "export"
    with pytest.raises(ConfigError, match="nothing is trainable"):
        train(tmp_path / "none", config=SFT, freezing__mask=everything)


def test_masks_over_sdxl(tmp_path: Path) -> None:
    """Names, freezing and adapters of the other U-Net family, on its tiny real class."""
    from mmalign.freezing import free_layers
    from tests.fixtures.tiny import VARIANTS, load

    family = load("sdxl", VARIANTS["sdxl"].build(tmp_path / "sdxl"))
    network = family.network
    names = [name for name, _ in network.named_parameters()]
    mask = FreezeMask.of(network, names[::3])
    held = guard(network, mask)
    assert len(held.parameters()) == len(names) - len(names[::3])
    assert free_layers(network, mask, family.lora_targets["attention"])


@pytest.mark.parametrize("tuning", ["{name: full}", "{name: lora, rank: 2}"])
def test_vision_language_models(tuning: str, tmp_path: Path) -> None:
    from mmalign.experiment import train as run_training
    from mmalign.experiment.opening import load_any
    from mmalign.freezing.names import published
    from tests.fixtures import tiny_vlm
    from tests.fixtures.vlm_runs import write_experiment, write_table

    tiny_vlm.build("llava", tmp_path / "llava")
    write_table(tmp_path, "pairs")
    file = write_experiment(tmp_path, tmp_path / "llava", tmp_path / "pairs.jsonl")
    import torch

    base = load_any(load_experiment(file).config, torch.device("cpu")).network
    names = [name for name, value in published(base).items() if value.ndim > 1][::2]
    mask = FreezeMask.of(base, names)
    path = mask.save(tmp_path / "freeze_mask.json")
    overrides = [f"freezing.mask={path}", f"tuning={tuning}", f"run.out={tmp_path / 'run'}", "optim.steps=2", "reference=null"]
    run_training(file, overrides)
    opened = open_run(tmp_path / "run")
    held = guard_of(opened.aligned)
    assert held is not None and held.verify().intact and held.verify().checked == len(names)
    trained = [name for name, value in opened.aligned.named_parameters() if value.requires_grad]
    assert trained and not {name.split(".lora_")[0] + ".weight" for name in trained if "lora_" in name} & set(names)
    assert (tmp_path / "run" / "export" / "freeze_mask.json").is_file()
