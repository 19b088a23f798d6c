"""A personalised run from its shipped file to pictures for a newcomer, through the public commands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mmalign import assets
from mmalign.cli.application import app
from mmalign.errors import ConfigError, DataError, ModelError
from mmalign.experiment import check, open_run, train
from mmalign.experiment.users import People, prepare_people
from mmalign.export import export_run
from mmalign.models.users.adapter import adapter_of
from mmalign.models.users.pipeline import PersonalPipeline
from mmalign.personalize import parse_mix, personalize, sample_for, store_of
from tests.data.making import picture

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "tiny" / "personalized_dpo.yaml"
Folders = Callable[[str], Path]
PROMPTS = ["a red circle", "a blue star"]
CLIP = "tiny-clip"


def write_votes(folder: Path, votes: dict[str, int], first: int = 0) -> Path:
    """A JSONL table: user -> number of votes, every one on pictures of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, number = [], first
    for user, count in votes.items():
        for _ in range(count):
            for side in (0, 1):
                (folder / f"{number}-{side}.png").write_bytes(picture(2 * number + side, size=(64, 64)))
            row = {"id": f"v{number}", "prompt": f"a red circle {number % 3}", "chosen": f"{number}-0.png",
                   "rejected": f"{number}-1.png", "user": user}  # fmt: skip
            lines.append(json.dumps({key: value for key, value in row.items() if value}))
            number += 1
    path = folder / "votes.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def overrides(model: Path, votes: Path, out: Path, *more: str) -> list[str]:
    return [
        f"model.path={model}", f"data.manifest={votes}", f"run.out={out}", "optim.steps=2", "optim.warmup_steps=0",
        "optim.batch_size=3", "run.log_every=1", "run.save_every=1", "evaluate.prompts=null", "evaluate.rewards=[]",
        "evaluate.holdout=[]", "evaluate.steps=2", f"method.users.path={assets.path(CLIP)}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_votes(tmp_path_factory.mktemp("votes"), {"alice": 6, "bob": 5, "carol": 3, "": 1})


@pytest.fixture(scope="module")
def run(tiny_folder: Folders, votes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, with LoRA beside the users' attention."""
    out = tmp_path_factory.mktemp("run") / "run"
    train(CONFIG, overrides(tiny_folder("sd1"), votes, out, "tuning={name: lora, rank: 2}", "optim.lr=0.02"))
    return out


def test_check_tells_what_will_be_trained(tiny_folder: Folders, votes: Path, tmp_path: Path) -> None:
    told = check(CONFIG, overrides(tiny_folder("sd1"), votes, tmp_path / "run"))
    from mmalign.models.diffusion import FAMILIES
    from mmalign.models.users.adapter import AdapterSettings, attach

    config = FAMILIES.get("sd").Config(name="sd", path=str(tiny_folder("sd1")))  # type: ignore[attr-defined]
    network = FAMILIES.get("sd").load(config, device=torch.device("cpu")).network  # type: ignore[attr-defined]
    adapter = attach(network, AdapterSettings(rows=1, dim=3 * 96))
    count = sum(value.numel() for value in adapter.parameters())
    assert f"trained    {count:,} of" in told
    nameless = write_votes(tmp_path / "nameless", {"": 4})
    with pytest.raises(ConfigError, match="no column 'user' with names"):
        check(CONFIG, overrides(tiny_folder("sd1"), nameless, tmp_path / "run"))
    with pytest.raises(ConfigError, match="tuning.name: 'user' trains what 'diffusion_dpo' has not"):
        check(ROOT / "configs" / "tiny" / "diffusion_dpo.yaml", [
            f"data.manifest={votes}", "tuning={name: user}", f"model.path={tiny_folder('sd1')}"])  # fmt: skip


def test_the_run_keeps_users_without_their_names(run: Path, votes: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["samples_dropped"] == {"no_user": 1, "no_support": 3}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(float(np.log(2)), abs=1e-6) and lines[1]["loss"] != lines[0]["loss"]
    written = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in written if re.search(rb"alice|bob\b|carol", path.read_bytes())]
    # Carol's three votes are too few to train on, and she is known all the same.
    assert [len(entry.pairs) for entry in store_of(open_run(run)).entries()] == [6, 5, 3]
    cache = votes.parent / "cache" / "users"
    assert list(cache.rglob("shard-*.safetensors"))
    assert not [path for path in cache.rglob("*") if path.is_file() and b"alice" in path.read_bytes()]


def test_a_newcomer_is_taken_in_and_gets_pictures(run: Path, tmp_path: Path) -> None:
    mine = write_votes(tmp_path, {"": 4}, first=40)
    made = personalize(run, mine, PROMPTS, user="dora", out=tmp_path / "out", seed=3)
    assert made.pairs == 4 and made.mix == {"dora": 1.0} and made.pictures.shape == made.base.shape == (2, 64, 64, 3)
    assert (made.pictures != made.base).any()
    assert (tmp_path / "out" / "grid.png").is_file() and len(list((tmp_path / "out" / "pictures").iterdir())) == 4
    told = json.loads((tmp_path / "out" / "personal.json").read_text())
    assert told["pairs"] == 4 and "dora" not in json.dumps(told)
    again = personalize(run, None, PROMPTS, user="dora", out=tmp_path / "again", seed=3)
    np.testing.assert_array_equal(again.pictures, made.pictures)
    nothing = personalize(run, None, PROMPTS, user="dora", out=tmp_path / "zero", seed=3, scale=0.0)
    np.testing.assert_array_equal(nothing.pictures, made.base)
    other = personalize(run, None, PROMPTS, user="alice", out=tmp_path / "alice", seed=3)
    assert (other.pictures != made.pictures).any() and (other.base == made.base).all()
    mixed = personalize(run, None, PROMPTS, mix={"dora": 1.0, "alice": 0.0}, out=tmp_path / "mix", seed=3)
    assert np.abs(mixed.pictures.astype(int) - made.pictures.astype(int)).max() <= 1


def test_rows_for_different_people_are_those_of_single_calls(run: Path) -> None:
    opened = open_run(run)
    store = store_of(opened)
    alice, bob = [(store.get("alice"), 1.0)], [(store.get("bob"), 1.0)]
    together = sample_for(opened, [alice, bob, []], [*PROMPTS, PROMPTS[0]])
    for row, who in enumerate((alice, bob)):
        alone = sample_for(opened, [who], [PROMPTS[row]])[0]
        assert np.abs(alone.astype(int) - together[row].astype(int)).max() <= 1


def test_mistakes_are_told(run: Path, tmp_path: Path) -> None:
    few = write_votes(tmp_path / "few", {"": 3}, first=50)
    with pytest.raises(ConfigError, match="3 decided pairs of 'me'; at least 4 are needed"):
        personalize(run, few, PROMPTS)
    two = write_votes(tmp_path / "two", {"x": 4, "y": 4}, first=60)
    with pytest.raises(ConfigError, match="of 2 people .*say whose with --user"):
        personalize(run, two, PROMPTS)
    with pytest.raises(ConfigError, match="no user 'nobody' here"):
        personalize(run, None, PROMPTS, user="nobody")
    with pytest.raises(ConfigError, match="weights sum to 0.9"):
        parse_mix("alice=0.3,bob=0.6")
    for text, message in (("alice", "is not NAME=WEIGHT"), ("alice=x", "is not NAME=WEIGHT"), ("a=0.5,a=0.5", "named twice")):
        with pytest.raises(ConfigError, match=message):
            parse_mix(text)
    with pytest.raises(DataError):
        personalize(run, tmp_path / "none.jsonl", PROMPTS, user="x")


def test_the_commands(run: Path, tmp_path: Path) -> None:
    mine = write_votes(tmp_path, {"": 4}, first=70)
    runner = CliRunner()

    def ask(*words: object) -> str:
        found = runner.invoke(app, [str(word) for word in words])
        assert found.exit_code == 0, found.output
        return found.output

    assert "taken in from 4 pairs" in ask("users", "add", run, "erik", "--pairs", mine)
    before = ask("users", "list", run)
    assert "encoded      4 pairs" in before and "erik" not in before
    text = ask("personalize", run, "--mix", "erik=0.4,alice=0.6", "--prompts", "a red circle", "--out", tmp_path / "mix",
               "--mode", "attention", "--user-guidance", "1.5")  # fmt: skip
    assert "1 pictures for erik 0.4, alice 0.6" in text and (tmp_path / "mix" / "grid.png").is_file()
    assert "users.safetensors" in ask("users", "export", run, "--out", tmp_path / "users.safetensors", "--user", "erik")
    assert "is removed" in ask("users", "remove", run, "erik")
    assert ask("users", "list", run).count("\n") == before.count("\n") - 1
    refused = runner.invoke(app, ["users", "remove", str(run), "erik"])
    assert refused.exit_code == 2
    assert runner.invoke(app, ["personalize", str(run)]).exit_code == 2


def test_exports_bring_the_users_along(run: Path, tmp_path: Path) -> None:
    opened = open_run(run)
    store = store_of(opened)
    expected = sample_for(opened, [[(store.get("alice"), 1.0)]], [PROMPTS[0]])
    export_run(run, "peft", tmp_path / "small")
    names = {path.name for path in (tmp_path / "small").rglob("*") if path.is_file()}
    assert {"pytorch_lora_weights.safetensors", "user_adapter.safetensors", "ip_adapter.safetensors", "users.json"} <= names
    export_run(run, "diffusers", tmp_path / "whole")
    pipeline = PersonalPipeline.from_pretrained(tmp_path / "whole", safety_checker=None)
    opened.family.network = pipeline.network  # the same sampling code on the exported network
    opened.aligned = pipeline.network
    found = sample_for(opened, [[(pipeline.store.get("alice"), 1.0)]], [PROMPTS[0]])  # type: ignore[union-attr]
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1, "LoRA merged, user attention beside it"
    with pytest.raises(ConfigError, match="its readers know no users"):
        export_run(run, "kohya", tmp_path / "kohya")


def test_a_resumed_run_ends_as_an_uninterrupted_one(tiny_folder: Folders, votes: Path, tmp_path: Path) -> None:
    def last(out: Path) -> dict[str, torch.Tensor]:
        adapter = adapter_of(open_run(out).aligned)
        assert adapter is not None
        return {name: value.clone() for name, value in adapter.state_dict().items()}

    words = overrides(tiny_folder("sd1"), votes, tmp_path / "whole")
    train(CONFIG, words)
    words = overrides(tiny_folder("sd1"), votes, tmp_path / "half", "optim.steps=1")
    train(CONFIG, words)
    train(CONFIG, [*words, "optim.steps=2"], resume=True)
    whole, half = last(tmp_path / "whole"), last(tmp_path / "half")
    assert whole.keys() == half.keys() and all(torch.equal(whole[name], half[name]) for name in whole)


@pytest.mark.parametrize("source", ["table", "prototypes"])
def test_learned_users_and_a_fitted_newcomer(tiny_folder: Folders, votes: Path, tmp_path: Path, source: str) -> None:
    learned = f"method.users={{source: {source}, rows: 2, dim: 8, prototypes: 3, sampling: uniform}}"
    words = [word for word in overrides(tiny_folder("sd1"), votes, tmp_path / "run") if not word.startswith("method.users.path")]
    train(CONFIG, [*words, learned, "optim.lr=0.02"])
    opened = open_run(tmp_path / "run")
    adapter, store = adapter_of(opened.aligned), store_of(opened)
    assert adapter is not None
    with torch.no_grad():
        torch.testing.assert_close(store.get("bob"), adapter.embeddings(torch.tensor(1)))
    mine = write_votes(tmp_path / "mine", {"": 4}, first=80)
    before = {name: value.clone() for name, value in opened.aligned.state_dict().items()}
    made = personalize(opened, mine, [PROMPTS[0]], user="finn", fit=3, out=tmp_path / "out")
    assert made.pairs == 4 and store.entries()[-1].kind == "fitted"
    assert all(torch.equal(value, before[name]) for name, value in opened.aligned.state_dict().items())
    assert not torch.equal(store.get("finn"), adapter.embeddings(torch.arange(3)).mean(0).detach())
    with pytest.raises(ConfigError, match="a new one has to be fitted"):
        personalize(opened, mine, [PROMPTS[0]], user="finn", fit=0)


def test_the_embedded_vision_language_model_reads_pairs(votes: Path, tmp_path: Path) -> None:
    """Both ways: four pairs in one prompt, whose last token's states are the embedding, and differences."""
    from mmalign import data
    from mmalign.models.users.encoders import load_encoder, shape_of
    from mmalign.models.users.settings import UsersConfig

    table = data.open_table(votes, progress=False)
    records = [table[row] for row in range(5)]
    for name in ("vlm", "vlm_difference"):
        settings = UsersConfig(encoder=name, path=str(assets.path("tiny-vlm")), new_tokens=4, instructions="Describe.")  # type: ignore[arg-type]
        encoder = load_encoder(settings, torch.device("cpu"))
        assert encoder.shape == shape_of(settings) == (5, 96)
        supports = [records[:4], records[1:]] if encoder.unit == "support" else [records[:1], records[1:2]]
        found = encoder(supports)
        assert found.shape == (2, 5, 96) and found[0].any() and not torch.equal(found[0], found[1])
        torch.testing.assert_close(encoder(supports[1:])[0], found[1], atol=1e-4, rtol=1e-3)
    long = load_encoder(UsersConfig(encoder="vlm", path=str(assets.path("tiny-vlm")), new_tokens=4), torch.device("cpu"))
    with pytest.raises(ModelError, match=r"take \d+ tokens and it reads 512; use fewer shots"):
        long([records[:4]])
    with pytest.raises(ModelError, match="reads a CLIP vision tower"):
        shape_of(UsersConfig(encoder="clip", path=str(assets.path("tiny-vlm"))))


def test_how_often_a_user_is_met(tiny_folder: Folders, tmp_path: Path) -> None:
    from mmalign import data
    from mmalign.experiment.settings import load_experiment

    path = write_votes(tmp_path, {"many": 24, "few": 6}, first=90)
    shares = {}
    for sampling in ("uniform", "sqrt"):
        words = overrides(tiny_folder("sd1"), path, tmp_path / "run", f"method.users.sampling={sampling}")
        config = load_experiment(CONFIG, words).config
        table = data.open_table(path, progress=False)
        checked = data.usable_rows(table, check="online", policy=data.CheckPolicy(max_bad_fraction=1), progress=False)
        people = prepare_people(config, table, checked, root=tmp_path / "cache", main=False)
        assert isinstance(people, People)
        order = people.order(seed=0, global_batch=6)
        assert order is not None
        met = [people.owners[slot.row] for step in range(40) for slot in order.batch(step)]
        shares[sampling] = met.count("few") / len(met)
    assert shares["uniform"] == pytest.approx(1 / 2, abs=0.05)
    assert shares["sqrt"] == pytest.approx(1 / 3, abs=0.05)
