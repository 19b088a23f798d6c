"""Throughput of reward scoring: ratios measured in one run on one machine.

    python benchmarks/rewards.py                      # a small ViT on the CPU, 1024-pixel JPEGs
    python benchmarks/rewards.py --model embedded --side 64 --images 512 --batch 64
    python benchmarks/rewards.py --model vit-h --device cuda --dtypes bf16 --loop-dtype bf16 --images 4096 --batch 256

Weights are random: throughput does not depend on their values. What is compared, and what the columns mean:
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flops import forward_flops, matmul_rate, on_meta
from rewards_inputs import SHAPES, TINY, Workload, make_pictures, make_weights, make_workloads
from rewards_loops import Snippets

from mmalign import rewards
from mmalign.errors import MmalignError
from mmalign.rewards.dual import DualEncoder
from mmalign.rewards.preprocess import normalise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-3, "bf16": 2.0, "fp16": 0.5}
"""How far scores of both sides may differ (clipscore counts to 100; half precision moves the cosine by up to 0.02)."""

WANTED = 3.0
"""How many times the loop is aimed for."""


class DifferentResultError(MmalignError):
    """The sides do not compute the same thing; speeds would mean nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of one piece of work."""

    wall: float
    cpu: float
    """Of all threads of this process."""

    def per(self, count: int) -> Cost:
        return Cost(wall=self.wall / count, cpu=self.cpu / count)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One workload in one precision; seconds are per cell (a picture with its prompt, all rewards)."""

    workload: str
    meaning: str
    dtype: str
    cells: int
    distinct_pictures: int
    loop: Cost
    reading_loop: Cost
    """The loop with its network read from disk at every call, as the released function of hpsv2 does."""
    encoder: Cost
    """Our image encoder alone, per distinct picture."""
    end_to_end: Cost
    over_loop: tuple[float, float, float]
    """Median, lowest and highest of the rounds, in wall time."""
    over_loop_cpu: float
    """Median in processor time, which a busy machine changes less."""
    bound: float
    """Ratio if everything but one encoder pass per distinct picture were free."""
    over_encoder: float
    """End to end as a share of encoder only, distinct pictures per second."""
    images_encoded: int
    texts_encoded: int


class Bench:
    """Weights, pictures and both sides."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options, self.weights = options, place / "weights"
        make_weights(self.weights, options.model)
        self.files = make_pictures(place / "pictures", options.images, options.side)
        self.snippets = Snippets(self.weights, device=options.device, dtype=DTYPES[options.loop_dtype],
                                 processor=options.processor)  # fmt: skip

    def scorers(self, workload: Workload, dtype: str) -> rewards.ScorerSet:
        paths = dict.fromkeys(workload.rewards, self.weights)
        return rewards.load(list(workload.rewards), paths, self.options.device, dtype, workers=self.options.workers)

    def ours(self, workload: Workload, loaded: rewards.ScorerSet) -> dict[str, torch.Tensor]:
        """Everything but loading; nothing is kept from earlier calls."""
        fresh = rewards.ScorerSet(loaded.backends, workers=self.options.workers)
        return fresh.score(list(workload.files), list(workload.prompts), batch_size=self.options.batch)

    def loop(self, workload: Workload, count: int) -> dict[str, list[float]]:
        """The first cells, one reward after the other, one picture at a time."""
        cells = list(zip(workload.files, workload.prompts, strict=True))[:count]
        return {name: [self.snippets.of(name)(file, text) for file, text in cells] for name in workload.rewards}

    def reading_loop(self, workload: Workload) -> None:
        """One cell by one reward, network and all."""
        options = self.options
        fresh = Snippets(self.weights, device=options.device, dtype=DTYPES[options.loop_dtype], processor=options.processor)
        fresh.of(workload.rewards[0])(workload.files[0], workload.prompts[0])

    def encoder(self, backend: DualEncoder, batches: int) -> None:
        """Our image encoder on ready-made pixels."""
        size = backend.preprocess.size
        pixels = torch.randint(0, 256, (self.options.batch, 3, size, size), dtype=torch.uint8, device=backend.device)
        with torch.inference_mode():
            for _ in range(batches):
                backend.encode_images(normalise(pixels, backend.mean, backend.std))

    def check(self, workload: Workload, loaded: rewards.ScorerSet, dtype: str) -> None:
        """Both sides give the same scores, or nothing is measured."""
        few = min(4, len(workload.files))
        head = dataclasses.replace(workload, files=workload.files[:few], prompts=workload.prompts[:few])
        expected, found = self.loop(head, few), self.ours(head, loaded)
        limit = TOLERANCE[dtype] if self.options.processor == "pil" else max(2.0, TOLERANCE[dtype])
        for name in workload.rewards:
            gap = float((found[name] - torch.tensor(expected[name])).abs().max())
            if not gap <= limit:
                raise DifferentResultError(f"{workload.name}, {dtype}: '{name}' differs by {gap:g} from the loop")

    def measure(self, workload: Workload, dtype: str, tick: Callable[[str], None]) -> Row:
        """Rounds of all sides in turn."""
        options, loaded = self.options, self.scorers(workload, dtype)
        backend = loaded.backends[0]
        if not isinstance(backend, DualEncoder):
            raise TypeError("the first reward of a workload is a dual encoder")
        tick(f"{workload.name}, {dtype}: same scores?")
        self.check(workload, loaded, dtype)
        self.encoder(backend, 1)
        few, batches = min(options.loop_cells, len(workload.files)), max(1, workload.distinct // options.batch)
        rounds = []
        for number in range(options.rounds):
            tick(f"{workload.name}, {dtype}: round {number + 1} of {options.rounds}")
            rounds.append((
                timed(lambda: self.loop(workload, few), options.device).per(few),
                timed(lambda: self.reading_loop(workload), options.device),
                timed(lambda: self.encoder(backend, batches), options.device).per(batches * options.batch),
                timed(lambda: self.ours(workload, loaded), options.device).per(len(workload.files)),
            ))  # fmt: skip
        counted = rewards.ScorerSet(loaded.backends, workers=options.workers)
        counted.score(list(workload.files), list(workload.prompts), batch_size=options.batch)
        return _row(workload, dtype, rounds, counted)


def _row(workload: Workload, dtype: str, rounds: Sequence[tuple[Cost, ...]], counted: rewards.ScorerSet) -> Row:
    share = workload.distinct / len(workload.files)
    ratios = [loop.wall / ours.wall for loop, *_, ours in rounds]
    sides = [
        Cost(wall=statistics.median(item.wall for item in side), cpu=statistics.median(item.cpu for item in side))
        for side in zip(*rounds, strict=True)
    ]
    counters = counted.engine.counters
    return Row(
        workload=workload.name, meaning=workload.meaning, dtype=dtype, cells=len(workload.files),
        distinct_pictures=workload.distinct, loop=sides[0], reading_loop=sides[1], encoder=sides[2], end_to_end=sides[3],
        over_loop=(statistics.median(ratios), min(ratios), max(ratios)),
        over_loop_cpu=statistics.median(loop.cpu / ours.cpu for loop, *_, ours in rounds),
        bound=statistics.median(loop.wall / (encoder.wall * share) for loop, _, encoder, _ in rounds),
        over_encoder=statistics.median(encoder.wall * share / ours.wall for *_, encoder, ours in rounds),
        images_encoded=sum(counters.images_encoded.values()), texts_encoded=sum(counters.texts_encoded.values()),
    )  # fmt: skip


def timed(work: Callable[[], object], device: str) -> Cost:
    """Wall and processor seconds of a call."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    wait()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    wait()
    return Cost(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def ceiling(bench: Bench, dtype: str) -> dict[str, float]:
    """FLOPs of one picture, and the pictures per second that matrix products alone would allow."""
    backend = rewards.load_backend("clipscore", bench.weights, bench.options.device, dtype)
    if not isinstance(backend, DualEncoder):
        raise TypeError("clipscore is a dual encoder")
    size = backend.preprocess.size
    net = on_meta(backend.net)
    pixels = torch.empty((1, 3, size, size), device="meta")
    flops = forward_flops(lambda: net.embed_images(pixels))  # type: ignore[operator]
    device = torch.device(bench.options.device)
    rate = matmul_rate(8192 if device.type == "cuda" else 1024, DTYPES[dtype], device)
    return {"flops_per_picture": flops, "matmul_flops": rate, "pictures_per_second": rate / flops}


def text_of(row: Row) -> str:
    """One workload for people."""
    middle, low, high = row.over_loop
    return (
        f"{row.workload:<10} {row.dtype}  loop {1 / row.loop.wall:8.2f}/s   ours {1 / row.end_to_end.wall:8.2f}/s   "
        f"x{middle:.2f} ({low:.2f} to {high:.2f}; processor time x{row.over_loop_cpu:.2f}; bound x{row.bound:.2f})   "
        f"{100 * row.over_encoder:.0f} % of encoder only   "
        f"{row.cells} cells, {row.images_encoded} pictures and {row.texts_encoded} prompts encoded; with the network read "
        f"at every call {1 / row.reading_loop.wall:.2f}/s, ours x{row.reading_loop.wall / row.end_to_end.wall:.1f}"
    )


def table_of(rows: Sequence[Row]) -> str:
    """Which workloads are `WANTED` times the loop, and whether those that are not could be."""
    lines = ["", f"{'workload':<34}{'over the loop':>14}{'bound':>9}{'of encoder only':>17}   {WANTED:g}x the loop?"]
    for row in rows:
        reached = row.over_loop[0] >= WANTED
        verdict = "yes" if reached else "no" if row.bound >= WANTED else "no, and no code could in this precision: see bound"
        name, share = f"{row.workload}, {row.dtype}", 100 * row.over_encoder
        lines.append(f"{name:<34}{row.over_loop[0]:>13.2f}x{row.bound:>8.2f}x{share:>15.0f} %   {verdict}")
        if row.workload == "distinct":
            ratio = row.reading_loop.wall / row.end_to_end.wall
            name = f"{row.workload}, {row.dtype}, loop as hpsv2's"
            verdict = "yes" if ratio >= WANTED else "no"
            lines.append(f"{name:<34}{ratio:>13.2f}x{'':>26}   {verdict} (it reads its network at every call)")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[TINY, *SHAPES], default="vit-s")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"], help="of our encoders")
    parser.add_argument("--loop-dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--processor", choices=["pil", "auto"], default="pil", help="of the loop")
    parser.add_argument("--loop-cells", type=int, default=16, help="cells for the one-at-a-time loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", default=None)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 2 when the sides disagree."""
    options = parse(arguments)
    rows: list[Row] = []
    result: dict[str, Any] = {"options": {key: str(value) for key, value in vars(options).items()}, "rows": []}
    result["threads"] = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as place:
        try:
            bench = Bench(options, Path(place))
            for dtype in options.dtypes:
                result[f"ceiling_{dtype}"] = found = ceiling(bench, dtype)
                print(f"{options.model}, {dtype}: {found['flops_per_picture'] / 1e9:.2f} GFLOP per picture; matrix products "
                      f"alone would allow {found['pictures_per_second']:.1f} pictures/s")  # fmt: skip
                for workload in make_workloads(bench.files):
                    if options.workloads is None or workload.name in options.workloads:
                        row = bench.measure(workload, dtype, lambda text: print(f"  {text}", file=sys.stderr))
                        rows.append(row)
                        result["rows"].append(dataclasses.asdict(row))
                        print(text_of(row), flush=True)
            print(table_of(rows))
        except MmalignError as error:
            print(error, file=sys.stderr)
            return 2
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
