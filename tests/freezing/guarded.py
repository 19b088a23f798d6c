"""Masks of the embedded model, learnt in a short run."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from mmalign.experiment import train as run
from tests.freezing.conftest import ROOT

BASE = ROOT / "assets" / "tiny-sd"
GUARD = str(ROOT / "configs" / "tiny" / "freeze_as_guard.yaml")


def few_domains(folder: Path, number: int = 16) -> Path:
    """The embedded table of domains with the first pictures of each split and role: every domain, a sixteenth to encode."""
    if not folder.exists():
        table = pq.read_table(ROOT / "assets" / "tiny-domains" / "part-00000.parquet")
        kept = [int(name.rpartition("-")[2]) < number for name in table["id"].to_pylist()]
        folder.mkdir()
        pq.write_table(table.filter(kept), folder / "part-00000.parquet")
    return folder


def learn(out: Path, resume: bool = False, **more: object) -> Path:
    """A run of 9 steps: four user steps and one mask step for each domain, then four user steps of the first."""
    values: dict[str, object] = {
        "data.manifest": few_domains(out.parent / "domains"), "model.path": BASE, "run.out": out,
        "optim.steps": 10, "optim.batch_size": 2, "method.user_steps": 4, "method.episode": 4, "run.log_every": 1,
        "run.save_every": 5, "run.keep_checkpoints": 0,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in more.items()}
    run(GUARD, [f"{key}={value}" for key, value in values.items()], resume=resume)
    return out
