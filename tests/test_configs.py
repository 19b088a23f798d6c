"""Every shipped YAML file: decodes, says where its numbers come from, and names commands and files that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmalign.config import dump_yaml, load_yaml
from mmalign.errors import ConfigError
from mmalign.experiment import load_experiment

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for path in (ROOT / "configs").rglob("*") if path.is_file())
LAUNCHERS = [path for path in FILES if path.parent.name == "accelerate"]
FRAGMENTS = [path for path in FILES if "base" in path.relative_to(ROOT / "configs").parts]
GENERATIONS = [path for path in FILES if path.parent.name == "generate"]
SELECTIONS = [path for path in FILES if path.parent.name == "select"]
GUARDS = [path for path in FILES if path.parent.name == "evaluate_guard"]
HEADS = [path for path in FILES if path.parent.name == "pal"]
EXPERIMENTS = [path for path in FILES if path not in [*LAUNCHERS, *FRAGMENTS, *GENERATIONS, *GUARDS, *SELECTIONS, *HEADS]]
PRESETS = [path for path in EXPERIMENTS if path.parent.name != "tiny"]
HEAD_PARTS = ("Command", "Hardware", "Expected", "Source")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def head_of(path: Path) -> str:
    """The comment at the top of a file, without the hashes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((index for index, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line[1:].strip() for line in lines[:end])


def numbers(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of every number in a mapping; a list of numbers is one entry a number."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from numbers(value, f"{path}.{key}" if path else key)
    elif isinstance(values, list):
        for value in values:
            yield from numbers(value, path)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield path, f"{values:g}"


def stated(head: str, key: str) -> list[str]:
    """The numbers that a head states right behind a key: ``optim.betas 0.9 and 0.999`` gives both."""
    found = re.search(rf"(?<![\w.]){re.escape(key)} ((?:[\d.e+-]+(?: and )?)+)", head)
    return [f"{float(text.rstrip('.')):g}" for text in found[1].split(" and ") if text] if found else []


def test_nothing_under_configs_is_overlooked() -> None:
    assert {path.suffix for path in FILES} == {".yaml"}
    counts = (len(LAUNCHERS), len(FRAGMENTS), len(GENERATIONS), len(GUARDS), len(EXPERIMENTS))
    assert counts == (4, 13, 8, 1, 74), "new files: change the counts here"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=relative)
def test_experiments_decode_and_round_trip(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_experiment(relative(path)).config
    assert config.method_name == (path.stem if path.parent.name == "tiny" else path.parent.name)
    written = tmp_path / "config.yaml"
    written.write_text(dump_yaml(config), encoding="utf-8")
    assert load_experiment(written).config == config


@pytest.mark.parametrize("path", HEADS, ids=relative)
def test_heads_decode(path: Path) -> None:
    assert len(HEADS) == 2, "new files: change the count here"
    from mmalign import rewards
    from mmalign.scoring.pal import load_config

    config = load_config(path)
    assert rewards.card(config.encoder).backbone != "none"
    assert load_config(path, ["head.prototypes=1"]).head.prototypes == 1


@pytest.mark.parametrize("path", GENERATIONS, ids=relative)
def test_generations_decode(path: Path) -> None:
    from mmalign.generate import load_generation
    from mmalign.sampling.settings import asks_for_answers, load_sampling

    if asks_for_answers(path):
        assert load_sampling(path).manifest.startswith(("runs/", "data/"))
        return
    config = load_generation(path)
    assert (ROOT / config.prompts).is_file()
    assert sum(source.candidates for source in config.sources) == 4


@pytest.mark.parametrize("path", GUARDS, ids=relative)
def test_guard_evaluations_decode(path: Path) -> None:
    from mmalign.evaluate_guard import load_guard_evaluation

    config = load_guard_evaluation(path)
    assert config.masks
    assert (ROOT / config.data.manifest).is_dir() or config.data.manifest.startswith("data/")


@pytest.mark.parametrize("path", FRAGMENTS, ids=relative)
def test_fragments_are_used(path: Path) -> None:
    users = [other for other in EXPERIMENTS if any(source == relative(path) for source in sources_of(other))]
    assert users, "no experiment extends it"


def sources_of(path: Path) -> set[str]:
    """Every file that a value of this experiment comes from, relative to the checkout."""
    return {str(Path(source).resolve().relative_to(ROOT)) for source in load_yaml(path).provenance.values()}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=relative)
def test_heads_say_command_hardware_result_and_source(path: Path) -> None:
    head = head_of(path)
    for part in HEAD_PARTS:
        assert re.search(rf"^{part}\s+\S", head, re.MULTILINE), f"the head lacks '{part}'"
    for name in re.findall(r"(?:configs|scripts)/[\w/]+\.(?:yaml|py)", head):
        assert (ROOT / name).is_file(), f"the head names {name}, which does not exist"
    command = re.search(r"^Command\s+(.*?)^Hardware", head, re.MULTILINE | re.DOTALL)
    assert command is not None
    assert relative(path) in command[1] or "mmalign demo" in command[1]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=relative)
def test_every_number_is_in_the_head_with_its_value(path: Path) -> None:
    """A number without a source is how folklore starts; a head that disagrees with the file is worse."""
    head = head_of(path)
    wanted: dict[str, list[str]] = {}
    for key, value in numbers(load_yaml(path).values):
        wanted.setdefault(key, []).append(value)
    assert wanted, "an experiment without numbers"
    assert {key: stated(head, key) for key in wanted} == wanted


@pytest.mark.parametrize("path", PRESETS, ids=relative)
def test_presets_name_what_their_marks_mean(path: Path) -> None:
    """[P], [C], [D] and [O] stand for sources; every mark that is used is explained, and none is explained in vain."""
    head = head_of(path)
    source = re.search(r"^Source\s+(.*?)^$", head, re.MULTILINE | re.DOTALL)
    assert source is not None
    explained = set(re.findall(r"\[([A-Z])\]", source[1]))
    used = set(re.findall(r"\[([A-Z])\]", head.replace(source[0], "")))
    assert used == explained
    lines = [line for line in head.replace(source[0], "").splitlines() if re.match(r"[a-z]+\.[a-z_]+ ", line)]
    assert [line for line in lines if "[" not in line] == [], "a number without a mark"


def test_the_control_differs_from_the_method_in_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = ("diffusion_dpo", "diffusion_sft")
    dpo, sft = (load_experiment(f"configs/tiny/{name}.yaml").config.model_dump() for name in names)
    for section in ("model", "tuning", "data", "optim", "evaluate"):
        assert dpo[section] == sft[section], section
    assert {key: value for key, value in dpo["run"].items() if key != "name"} == {
        key: value for key, value in sft["run"].items() if key != "name"
    }


def test_a_step_of_the_full_presets_has_the_published_size() -> None:
    """2048 pairs: arXiv:2311.12908 and its launchers, on the 8 processes that the head names."""
    for name in ("sd15_pickapic", "sdxl_pickapic"):
        optim = load_experiment(ROOT / f"configs/diffusion_dpo/{name}.yaml").config.optim
        assert optim.batch_size * optim.accumulate * 8 == 2048
        assert optim.lr == pytest.approx(1e-8 * 2048)


def test_presets_download_no_reward_unasked() -> None:
    for path in PRESETS:
        evaluate = load_experiment(path).config.evaluate
        assert (evaluate.rewards, evaluate.holdout) == ((), ())
        if path.parent.name == "freeze_as_guard":
            assert evaluate.prompts is None, "it makes a mask and samples nothing"
            continue
        assert evaluate.prompts is not None
        assert (ROOT / evaluate.prompts).is_file()


@pytest.mark.parametrize("path", LAUNCHERS, ids=relative)
def test_launchers_are_what_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert values["mixed_precision"] == "no", "the experiment's model.dtype decides"
    read = load_config_from_file(str(path))
    assert read.num_processes == values["num_processes"] == int(re.sub(r"\D", "", path.stem) or 1)
    assert read.use_cpu == path.stem.startswith("cpu")


def test_a_changed_preset_is_still_checked() -> None:
    with pytest.raises(ConfigError, match=r"method\.betta.*did you mean 'beta'"):
        load_experiment(ROOT / "configs/diffusion_dpo/sd15_pickapic.yaml", ["method.betta=1"])
