"""Pairs a second of the data path, against what people use: a `datasets` table in a DataLoader, and WebDataset shards.

    python benchmarks/data.py [--pairs 192] [--side 512] [--seconds 4] [--rounds 5] [--wait-steps 12]

All arms read the same JPEG pairs and give batches of the same shape; each is measured in short windows, in turns, in
this one process (and the workers it starts), so that a busy machine slows all of them alike; the median window counts.

- plain: `datasets` with pictures decoded by Pillow in the transform, resized and cropped, in a DataLoader with two
  worker processes;
- webdataset: the same pictures in two tar shards, the same transform, the same DataLoader (left out where webdataset
  is not installed: the extra `bench` brings it);
- ours, uncached: the pair loader decoding in two threads, and in two processes;
- ours, cached: the pair loader gathering latents (4 x 64 x 64, mean and deviation) and text from caches.

Then: rows of 32 KiB gathered from a cache against one `torch.load` per file; and the share of a step that training
waits for data, from `metrics.jsonl` of a run of the mid-size network of `diffusion_dpo.py` on the CPU.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dpo_data import EncodedPair, encoded_pairs
from dpo_ours import write_table
from PIL import Image
from torch import Tensor

from mmalign import data

BATCH = 16
WORKERS = 2
READY = 5
"""Batches that an arm may have prepared while another was measured (DataLoader: two for each worker; ours: four)."""


class Pixels:
    """What both plain arms do to a pair, as the released Diffusion-DPO script does: decode, resize, centre crop, normalise."""

    def __init__(self, side: int) -> None:
        self.side = side

    def picture(self, encoded: bytes) -> Tensor:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        scale = self.side / min(image.size)
        size = (max(self.side, round(image.width * scale)), max(self.side, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        array = np.asarray(image.crop((left, top, left + self.side, top + self.side)))
        return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1

    def __call__(self, row: Mapping[str, Any]) -> Tensor:
        return torch.stack([self.picture(row["chosen"]), self.picture(row["rejected"])])


class TableTransform:
    """The transform of the `datasets` arm."""

    def __init__(self, side: int) -> None:
        self.pixels = Pixels(side)

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        pairs = zip(rows["chosen"], rows["rejected"], strict=True)
        return {"pair": [self.pixels({"chosen": one["bytes"], "rejected": two["bytes"]}) for one, two in pairs]}


class ShardTransform:
    """The transform of the WebDataset arm."""

    def __init__(self, side: int) -> None:
        self.pixels = Pixels(side)

    def __call__(self, sample: Mapping[str, Any]) -> Tensor:
        return self.pixels({"chosen": sample["chosen.jpg"], "rejected": sample["rejected.jpg"]})


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def plain_arm(table: Path, side: int) -> Iterator[Any]:
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(table / "part-*.parquet"), split="train")
    for column in ("chosen", "rejected"):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    rows = rows.select_columns(["chosen", "rejected"]).with_transform(TableTransform(side))
    return endless(
        torch.utils.data.DataLoader(
            rows, batch_size=BATCH, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True
        )
    )


def shard_arm(pairs: Sequence[EncodedPair], folder: Path, side: int) -> Iterator[Any] | None:
    try:
        import webdataset
    except ImportError:
        return None
    for shard in range(WORKERS):
        with tarfile.open(folder / f"pairs-{shard:06d}.tar", "w") as tar:
            for pair in pairs[shard::WORKERS]:
                for name, content in (("chosen.jpg", pair.chosen), ("rejected.jpg", pair.rejected)):
                    entry = tarfile.TarInfo(f"{pair.id}.{name}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    shards = str(folder / f"pairs-{{000000..{WORKERS - 1:06d}}}.tar")
    rows = webdataset.WebDataset(shards, shardshuffle=WORKERS).shuffle(64).map(ShardTransform(side))
    return endless(torch.utils.data.DataLoader(rows, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True))


def our_arms(table: Path, side: int) -> dict[str, Iterator[Any]]:
    opened = data.open_table(table, progress=False)
    checked = data.check_table(opened, progress=False)
    assert checked.media is not None
    settings: dict[str, Any] = {"resolution": (side, side), "flip": False}
    latents = data.Cache.open_or_create(table / "cache", "vae", {"bench": side})
    text = data.Cache.open_or_create(table / "cache", "text", {"bench": side})

    def encode(pixels: Tensor) -> dict[str, Tensor]:
        mean = torch.nn.functional.adaptive_avg_pool2d(pixels, 64).repeat(1, 2, 1, 1)[:, :4]
        return {"mean": mean, "std": mean.abs()}

    def encode_text(prompts: list[str]) -> dict[str, Tensor]:
        return {"tokens": torch.zeros(len(prompts), 77, 768, dtype=torch.float16)}

    data.fill_latents(
        latents, opened, checked.rows, checked.media, encode=encode, batch_size=16, progress=False, **settings
    )
    data.fill_text(text, opened, checked.rows, encode=encode_text, batch_size=64, progress=False)
    common: dict[str, Any] = {"batch_size": BATCH, "media": checked.media, "workers": WORKERS, **settings}
    uncached = data.PairLoader(opened, checked.rows, **common)
    cached = data.PairLoader(opened, checked.rows, latents=latents, text=text, **common)
    processes = data.PairLoader(opened, checked.rows, decode="processes", **common)
    return {
        "ours, uncached, threads": uncached.micro_batches(), "ours, uncached, processes": processes.micro_batches(),
        "ours, cached": cached.micro_batches(),
    }  # fmt: skip


def rate(batches: Iterator[Any], seconds: float) -> float:
    """Pairs a second of one window, once what was made ready in other arms' windows is used up."""
    for _ in range(READY):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not count:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - start)


def compare(given: argparse.Namespace, scratch: Path) -> dict[str, float]:
    pairs = encoded_pairs(given.pairs, given.side)
    table = write_table(pairs, scratch / "table")
    arms: dict[str, Iterator[Any]] = {"plain datasets + DataLoader": plain_arm(table, given.side)}
    shards = shard_arm(pairs, scratch, given.side)
    if shards is not None:
        arms["webdataset + DataLoader"] = shards
    arms |= our_arms(table, given.side)
    for batches in arms.values():
        next(batches)
    windows: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(given.rounds):
        for name, batches in arms.items():
            windows[name].append(rate(batches, given.seconds))
    return {name: statistics.median(found) for name, found in windows.items()}


def gathering(scratch: Path, entries: int = 2000) -> dict[str, float]:
    """Rows a second: 64 random entries of 4 x 64 x 64 fp16 at a time from a cache, and one file each through torch.load."""
    values = torch.randn(entries, 4, 64, 64).half()
    cache = data.Cache.open_or_create(scratch / "gather", "vae", {"entries": entries})
    cache.fill(((f"key-{n}", n) for n in range(entries)), lambda some: {"mean": values[some]}, batch_size=100)
    folder = scratch / "files"
    folder.mkdir()
    for number in range(entries):
        torch.save(values[number].clone(), folder / f"{number}.pt")
    chance = np.random.default_rng(0)

    def mapped() -> None:
        cache.gather([f"key-{n}" for n in chance.integers(0, entries, 64)])

    def loaded() -> None:
        torch.stack([torch.load(folder / f"{n}.pt", weights_only=True) for n in chance.integers(0, entries, 64)])

    found: dict[str, list[float]] = {"cache": [], "files": []}
    for _ in range(9):
        for name, work in (("cache", mapped), ("files", loaded)):
            found[name].append(64 / shortest(work))
    return {name: statistics.median(values) for name, values in found.items()}


def shortest(work: Callable[[], None], times: int = 5) -> float:
    """Seconds of the fastest of some calls: the one that was not interrupted."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def waiting(scratch: Path, steps: int) -> float:
    """Median share of a step that the mid-size run on the CPU waits for data."""
    from dpo_models import SPECS, model_folder

    import mmalign

    spec = SPECS["mid"]
    folder = model_folder(spec, scratch, torch.device("cpu"))
    table = write_table(encoded_pairs(32, spec.pixels), scratch / "mid-table")
    config = scratch / "mid.yaml"
    config.write_text(
        f"method: {{name: diffusion_dpo}}\nmodel: {{name: {spec.family}, path: {folder}, dtype: fp32}}\ntuning: {{name: lora}}\n"
        f"data: {{manifest: {table}}}\noptim: {{lr: 1e-5, steps: {steps}, batch_size: 1}}\n"
        "run: {name: wait, log_every: 1, save_every: 1000000, device: cpu}\n"
    )
    run = mmalign.run(config, out=str(scratch / "run"))
    lines = [json.loads(line) for line in (Path(run.folder) / "metrics.jsonl").read_text().splitlines()]
    shares = [line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line]
    return statistics.median(shares[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=192)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a window")
    parser.add_argument("--rounds", type=int, default=5, help="windows of every arm, in turns")
    parser.add_argument("--wait-steps", type=int, default=12, help="steps of the mid-size run; 0 leaves it out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        rates = compare(given, scratch)
        plain = rates["plain datasets + DataLoader"]
        print(
            f"\n{given.pairs} pairs of {given.side} px JPEG, batches of {BATCH}, {WORKERS} workers, {os.cpu_count()} cores\n"
        )
        print("| arm | pairs/s | against plain |\n|---|---:|---:|")
        for arm, value in rates.items():
            print(f"| {arm} | {value:,.1f} | {value / plain:.2f} |")
        found = gathering(scratch)
        print(f"\ngather of 32 KiB rows: {found['cache']:,.0f} rows/s, one torch.load per file {found['files']:,.0f} rows/s:"
              f" {found['cache'] / found['files']:.1f}x")  # fmt: skip
        if given.wait_steps:
            print(
                f"data wait of the mid-size run on the CPU: {waiting(scratch, given.wait_steps):.2%} of the step (median)"
            )


if __name__ == "__main__":
    main()
