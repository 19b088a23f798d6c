"""Files to pixels, without encoders: threads, processes, and the cheaper decodings; what they do to pixels and scores.

    python benchmarks/rewards_reading.py                                   # 1024-pixel JPEGs to 224 pixels, on this machine
    python benchmarks/rewards_reading.py --workers 1 2 --images 48 --rounds 5

One picture on one thread first: what each step costs, by the median of some runs. Then pictures per second of each way, on so
many threads or processes, in turns. The last part scores pictures with a CLIP of random weights by every way of making pixels.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rewards_inputs import make_pictures, make_weights

from mmalign import rewards
from mmalign.media import DEFAULT, decode_image
from mmalign.rewards.decoders import ProcessDecoders
from mmalign.rewards.inputs import read_picture
from mmalign.rewards.preprocess import Preprocess
from mmalign.rewards.reading import Reader
from mmalign.rewards.staging import interleaved

PLAIN = Preprocess("clip_hf", 224)
WAYS = {
    "full": PLAIN,
    "fast_preprocess": Preprocess("clip_hf", 224, fast=True),
    "draft2x": Preprocess("clip_hf", 224, draft=True),
    "both": Preprocess("clip_hf", 224, fast=True, draft=True),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {}, "fast_preprocess": {"fast_preprocess": True}, "draft2x": {"decode": "draft2x"},
    "both": {"fast_preprocess": True, "decode": "draft2x"},
}  # fmt: skip


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """Median of some calls."""
    work()
    spent = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        spent.append(1000 * (time.perf_counter() - begun))
    return statistics.median(spent)


def single(file: Path, rounds: int) -> dict[str, float]:
    """What one picture costs one thread."""
    data = file.read_bytes()
    image = decode_image(data).image
    room = np.empty((image.height, image.width, 4), np.uint8)

    def whole() -> None:
        stored = interleaved(decode_image(data).image)
        if stored is not None:
            room[...] = stored

    found = {
        "read and hash": milliseconds(lambda: read_picture(file), rounds),
        "decode": milliseconds(lambda: decode_image(data), rounds),
        "decode, copied whole": milliseconds(whole, rounds),
        "resize by Pillow": milliseconds(lambda: PLAIN.from_image(image), rounds),
        "resize by torch, 8 bits": milliseconds(lambda: WAYS["fast_preprocess"].from_image(image), rounds),
        "decode a draft": milliseconds(lambda: decode_image(data, draft=WAYS["draft2x"].least), rounds),
    }
    for name, rule in WAYS.items():
        draft = rule.least if rule.draft else None
        found[f"decode and resize, {name}"] = milliseconds(
            lambda rule=rule, draft=draft: rule.from_image(decode_image(data, draft=draft).image), rounds  # type: ignore[misc]
        )
    return found


def scaling(files: Sequence[Path], workers: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """Pictures per second by way and number of workers; ways take turns."""
    readers: dict[str, tuple[Reader, int]] = {}
    for count in workers:
        for name in ("full", "draft2x"):
            rules = {WAYS[name].key: WAYS[name]}
            for kind, decoders in (("threads", None), ("processes", ProcessDecoders(count))):
                made = Reader(rules, keep_image=False, limits=DEFAULT, decoders=decoders)
                readers[f"{name}, {count} {kind}"] = made, 2 * count if decoders else count
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(rounds + 1):
        for name, (reader, threads) in readers.items():
            with ThreadPoolExecutor(threads) as pool:
                begun = time.perf_counter()
                reader.read(files, 0, pool)
                if turn:  # the first one starts processes
                    rates[name].append(len(files) / (time.perf_counter() - begun))
    out = {}
    for name, (reader, _) in readers.items():
        found = rates[name]
        out[name] = {"median": statistics.median(found), "lowest": min(found), "highest": max(found)}
        if reader.decoders is not None:
            reader.decoders.close()
    return out


def deviations(files: Sequence[Path], model: str, place: Path) -> dict[str, dict[str, float]]:
    """Largest and mean difference of pixels, of cosines, and pairs whose order changes, against decoding and resizing in full."""
    make_weights(place, model)
    kinds = {"smooth": list(files), "noise": _noise(place, len(files))}
    out = {}
    for kind, chosen in kinds.items():
        full: torch.Tensor | None = None
        for name, rule in WAYS.items():
            scorer = rewards.load("clipscore-raw", place, "cpu", "fp32", **OPTIONS[name])
            values = scorer.score(chosen, "a red circle and a blue square", batch_size=8)
            full = values if full is None else full
            pixels = torch.stack([_pixels(file, rule).float() - _pixels(file, PLAIN).float() for file in chosen]).abs()
            order = (values[:, None] > values) != (full[:, None] > full)
            out[f"{kind}, {name}"] = {
                "grey levels, mean": float(pixels.mean()), "grey levels, largest": float(pixels.max()),
                "cosine, mean": float((values - full).abs().mean()), "cosine, largest": float((values - full).abs().max()),
                "spread of cosines": float(full.std()), "pairs in another order": float(order.float().mean()),
            }  # fmt: skip
    return out


def _pixels(file: Path, rule: Preprocess) -> torch.Tensor:
    return rule.from_image(decode_image(file.read_bytes(), draft=rule.least if rule.draft else None).image)


def _noise(place: Path, count: int) -> list[Path]:
    """Pictures with sharp edges and grain: the worst case for a cheap decoding."""
    from PIL import Image

    out = []
    for index in range(count):
        draws = np.random.default_rng(1000 + index)
        blocks = np.kron(draws.integers(0, 256, (32, 32, 3)), np.ones((32, 32, 1), np.int64))
        grain = draws.integers(-30, 31, blocks.shape)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(blocks + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
        file = place / f"noise-{index}.jpg"
        file.write_bytes(buffer.getvalue())
        out.append(file)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="threads, or processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=["vit-s", "vit-b", "embedded"], default="vit-s", help="that scores the pictures")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        files = make_pictures(place / "pictures", options.images, options.side)
        found["milliseconds"] = single(files[0], options.rounds)
        for step, spent in found["milliseconds"].items():
            print(f"{step:36} {spent:7.2f} ms", flush=True)
        found["pictures per second"] = scaling(files, options.workers, options.rounds)
        for way, rate in found["pictures per second"].items():
            print(f"{way:28} {rate['median']:7.1f}/s ({rate['lowest']:.1f} to {rate['highest']:.1f})", flush=True)
        found["deviations"] = deviations(files, options.model, place / "weights")
        for way, numbers in found["deviations"].items():
            print(f"{way:28} " + ", ".join(f"{key} {value:.3g}" for key, value in numbers.items()), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
