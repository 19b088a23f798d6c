"""Every message about settings, and the schema for editors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest

from mmalign.config import Resolved, Section, decode, json_schema, load_yaml
from mmalign.errors import ConfigError

from . import sections
from .conftest import WriteFile
from .sections import DPO, SFT, Colour, Experiment, Full, Lora, Noise, Optim, Run

SECTIONS = sections.__name__


def problems_of(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        decode(Experiment, Resolved(source="x.yaml", values=values, provenance={}))
    return caught.value.problems


def given(**sections: Any) -> dict[str, Any]:
    return {"method": {"name": "sft"}, "tuning": {"name": "full"}, **sections}


def test_a_file_becomes_typed_frozen_sections() -> None:
    values = given(
        method={"name": "diffusion_dpo", "beta": 2000, "noise": {"steps": 3}},
        optim={"betas": [0, 0.5], "lr": 1},
        run={"out": "runs/x", "colour": "blue", "cache": False, "weights": {"a": 1}, "stages": [{"steps": 1}, {}]},
        extra={"name": "lora", "targets": ["a", "b"]},
    )
    found = decode(Experiment, Resolved(source="x", values=values, provenance={}))
    assert found == Experiment(
        method=DPO(name="diffusion_dpo", beta=2000.0, noise=Noise(steps=3)),
        tuning=Full(name="full"),
        optim=Optim(betas=(0.0, 0.5), lr=1.0),
        run=Run(
            out=Path("runs/x"), colour=Colour.BLUE, cache=False, weights={"a": 1.0}, stages=[Noise(steps=1), Noise()]
        ),
        extra=Lora(name="lora", targets=("a", "b")),
    )
    assert isinstance(found.optim.lr, float)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        found.optim.lr = 2.0  # type: ignore[misc]


MESSAGES = [
    (given(optim={"lr": "fast"}), "optim.lr: expected a number, got 'fast'"),
    (given(optim={"lr": True}), "optim.lr: expected a number, got true"),
    (given(optim={"lr": None}), "optim.lr: expected a number, got null"),
    (given(optim={"lr": {"a": 1}}), "optim.lr: expected a number, got a mapping"),
    (given(optim={"clip": "x"}), "optim.clip: expected a number, got 'x'"),
    (given(optim={"steps": 1.5}), "optim.steps: expected a whole number, got 1.5"),
    (given(optim={"steps": 1000.0}), "optim.steps: expected a whole number, got 1000.0"),
    (given(optim={"steps": "3"}), "optim.steps: expected a whole number, got '3'"),
    (given(optim={"steps": -1}), "optim.steps: expected a number at least 0, got -1"),
    (given(optim={"fused": "yes"}), "optim.fused: expected true or false, got 'yes'"),
    (given(optim={"fused": 1}), "optim.fused: expected true or false, got 1"),
    (given(run={"name": 2024}), "run.name: expected text, got 2024 (put it in quotes)"),
    (given(run={"out": 3}), "run.out: expected text, got 3 (put it in quotes)"),
    (given(run={"trackers": "tensorboard"}), "run.trackers: expected a list, got 'tensorboard'"),
    (given(run={"stages": {}}), "run.stages: expected a list, got a mapping"),
    (given(run={"stages": [{}, {"step": 1}]}), "run.stages.1.step: not a setting of 1; did you mean 'steps'?"),
    (given(run={"weights": [1]}), "run.weights: expected a mapping, got [1]"),
    (given(run={"weights": {"a": "b"}}), "run.weights.a: expected a number, got 'b'"),
    (given(run=3), "run: expected a mapping, got 3"),
    (
        given(optim={"schedule": "cosin"}),
        "optim.schedule: expected one of 'constant', 'cosine', 'off', got 'cosin'; did you mean 'cosine'?",
    ),
    (given(run={"colour": "green"}), "run.colour: expected one of 'red', 'blue', got 'green'"),
    (given(run={"cache": "fast"}), "run.cache: expected true or false, or 'auto', got 'fast'"),
    (given(optim={"betas": [0.9]}), "optim.betas.1: required, but the list ends before it"),
    (given(optim={"betas": [1, 2, 3]}), "optim.betas: expected at most 2 elements, got 3"),
    (given(optim={"lrr": 1}), "optim.lrr: not a setting of optim; did you mean 'lr'?"),
    (given(zzz=1), "zzz: not a setting of an experiment (known: extra, method, optim, run, tuning)"),
    (given(method={"name": "sft", "learning_rate": 1}), "method.learning_rate: not a setting of sft; that is 'optim.lr' here"),
    (given(optim={"max_train_steps": 1}), "optim.max_train_steps: not a setting of optim; that is 'optim.steps' here"),
    (given(beta_dpo=1), "beta_dpo: not a setting of an experiment; that is 'method.beta' of 'diffusion_dpo' here"),
    (given(lora_rank=1), "lora_rank: not a setting of an experiment; that is 'tuning.rank' of 'lora' here"),
    (given(run={"lr": 1}), "run.lr: not a setting of run; that is 'optim.lr' here"),
    (given(resume_from_checkpoint="latest"), "resume_from_checkpoint: not a setting of an experiment; that is '--resume' here"),
    (given(optm={}), "optm: not a setting of an experiment; did you mean 'optim'?"),
    ({"method": {"name": "sft"}}, "tuning: required, but not set"),
    ({"tuning": {"name": "full"}}, "method: required, but not set (What is trained)"),
    (
        given(method={"name": "diffusion_dpo"}),
        "method.beta: required, but not set (Strength of the pull to the reference)",
    ),
    (
        given(method={"name": "diffusion_dpo", "beta": 1, "betta": 1}),
        "method.betta: not a setting of diffusion_dpo; did you mean 'beta'?",
    ),
    (
        given(method={"name": "diffusion_dpo", "beta": 1, "noise": {"stps": 1}}),
        "method.noise.stps: not a setting of noise; did you mean 'steps'?",
    ),
    (
        given(method={"name": "diffusion_dpo", "beta": 1, "smoothing": 0.7}),
        "method: smoothing must be in [0, 0.5), got 0.7",
    ),
    (given(tuning={"name": "full", "rank": 4}), "tuning.rank: not a setting of 'full' (settings of 'lora' include it)"),
    (given(extra={"name": "full", "rank": 4}), "extra.rank: not a setting of 'full' (settings of 'lora' include it)"),
    (given(tuning={"name": "lora", "rank": "big"}), "tuning.rank: expected a whole number, got 'big'"),
    (given(tuning="full"), "tuning: expected a mapping with 'name', such as {name: lora}, got 'full'"),
    (given(tuning={"rank": 4}), "tuning.name: required: which tuning? (one of lora, full)"),
    (given(tuning={"name": 4}), "tuning.name: expected text"),
    (
        given(method={"name": "diffusion_dop"}),
        "method.name: method 'diffusion_dop' is not known; did you mean 'diffusion_dpo'?",
    ),
    (
        given(method={"name": "nowhere.at:All"}),
        "method.name: no module named 'nowhere' (asked for by 'nowhere.at:All')",
    ),
    (given(method={"name": f"{SECTIONS}:Nothing"}), f"method.name: module '{SECTIONS}' has no 'Nothing'"),
    (
        given(method={"name": f"{SECTIONS}:Path"}),
        f"method.name: '{SECTIONS}:Path' is neither an mmalign.config.Section class "
        "nor has one as its attribute Config",
    ),
    (
        given(method={"name": f"{SECTIONS}:NoName"}),
        f"method.name: '{SECTIONS}:NoName': its section NoName lacks the field 'name: str'",
    ),
]


@pytest.mark.parametrize(("values", "message"), MESSAGES, ids=[message[:48] for _, message in MESSAGES])
def test_message(values: dict[str, Any], message: str) -> None:
    assert problems_of(values) == [message]


def test_all_problems_are_reported_at_once(write: WriteFile) -> None:
    path = write(
        "exp.yaml",
        """
        method: {name: diffusion_dpo, betta: 5000, beta: 1}
        tuning: {name: full, rank: 4}
        optim: {lr: fast}
        """,
    )
    with pytest.raises(ConfigError) as caught:
        decode(Experiment, load_yaml(path))
    assert str(caught.value) == (
        "exp.yaml: 3 problems\n"
        "  method.betta: not a setting of diffusion_dpo; did you mean 'beta'?\n"
        "  tuning.rank: not a setting of 'full' (settings of 'lora' include it)\n"
        "  optim.lr: expected a number, got 'fast'"
    )


def test_a_message_says_which_other_file_is_at_fault(write: WriteFile) -> None:
    write("base.yaml", "method: {name: sft}\ntuning: {name: full}\noptim: {lr: fast}\n")
    path = write("main.yaml", "extends: base.yaml\nrun: {seed: x}\n")
    with pytest.raises(ConfigError) as caught:
        decode(Experiment, load_yaml(path, ["run.nme=y"]), source="the demo")
    assert caught.value.source == "the demo"
    assert caught.value.problems == [
        "optim.lr: expected a number, got 'fast' (set in base.yaml)",
        "run.seed: expected a whole number, got 'x'",
        "run.nme: not a setting of run; did you mean 'name'? (set on the command line)",
    ]


def test_a_class_of_the_users_own_is_imported(
    write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from mmalign.config import Section\nclass Mine(Section):\n    name: str\n    knob: int = 3\n"
    (tmp_path / "users_own_method.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    values = given(method={"name": "users_own_method:Mine", "knob": 5})
    found = decode(Experiment, Resolved(source="x", values=values, provenance={}))
    assert found.method.model_dump() == {"name": "users_own_method:Mine", "knob": 5}


def test_a_module_of_the_users_own_that_does_not_import_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_broken_method.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert problems_of(given(method={"name": "users_broken_method:Mine"})) == [
        "method.name: importing 'users_broken_method:Mine' failed: ModuleNotFoundError: "
        "No module named 'not_installed_anywhere'"
    ]


def test_the_schema_offers_one_branch_per_variant() -> None:
    schema = json_schema(Experiment)
    branches = schema["properties"]["tuning"]["oneOf"]
    assert [branch["title"] for branch in branches][:2] == ["lora", "full"]
    assert branches[0]["allOf"][1] == {"properties": {"name": {"const": "lora"}}, "required": ["name"]}
    assert schema["properties"]["method"]["oneOf"][0]["description"] == "pairs"
    assert schema["properties"]["method"]["description"] == "What is trained."
    assert "extends" in schema["properties"]
    assert schema["then"] == {"required": ["method", "tuning"]}
    section = branches[0]["allOf"][0]
    section = schema["$defs"][section["$ref"].rpartition("/")[2]] if "$ref" in section else section
    assert section["properties"]["rank"] == {"default": 16, "title": "Rank", "type": "integer"}
    assert "required" not in section, "a file may leave to the one it extends what it does not change"


def test_reading_a_configuration_needs_no_torch() -> None:
    heavy = ("torch", "numpy", "diffusers", "transformers")
    code = f"import sys, mmalign.config; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_callers_are_held_to_the_same_types() -> None:
    with pytest.raises(pydantic.ValidationError, match="valid number"):
        Optim(lr="1e-4")  # type: ignore[arg-type]
    with pytest.raises(pydantic.ValidationError, match="Extra inputs"):
        SFT(name="sft", beta=1.0)  # type: ignore[call-arg]
    assert isinstance(Experiment(method=SFT(name="sft"), tuning=Full(name="full")).method, Section)
