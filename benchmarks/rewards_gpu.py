"""Throughput of reward scoring on one GPU: ViT-H/14 with random weights (the layout of PickScore and HPS) on 1024-pixel JPEGs.

    python benchmarks/rewards_gpu.py --minutes 2 --json rewards_gpu.json          # one CUDA GPU, nothing is downloaded
    python benchmarks/rewards_gpu.py --device cpu --model tiny --images 48 --side 256 --minutes 0.5      # tries the path

Prints as it goes, and writes the JSON file after every part, so that an interrupted run leaves what it has. Parts: pixels and
scores of the GPU path against the CPU path; the encoders alone; reading and decoding alone; all of it end to end; a loop over
single pictures in the manner of the packages' examples, on the same weights; and `mmalign score` on a table of the same pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
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
from flops import matmul_rate
from PIL import Image, features
from PIL import __version__ as pillow_version
from rewards_command import command
from rewards_models import Models, build

from mmalign import rewards
from mmalign.rewards.decoders import SLOTS_EACH, WHOLE_SLOT, ProcessDecoders, best_processes
from mmalign.rewards.engine import AHEAD
from mmalign.rewards.loading import prepare_as
from mmalign.rewards.preprocess import Preprocess, normalise
from mmalign.rewards.reading import default_workers
from mmalign.rewards.scorer import ScorerSet
from mmalign.rewards.staging import BEFORE, DeviceResize

TARGETS = {"encoder": 1500.0, "end to end": 1000.0}
"""Pictures (with their prompt) per second that are hoped for on an H200-class GPU with 16 cores."""
CEILING = 790e12
"""FLOP/s of bf16 matrix products that the arithmetic ceiling is stated for; the measured rate is printed beside it."""


class Bench:
    """Options, models, pictures, and what has been found."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options, self.place, self.begun = options, place, time.perf_counter()
        self.device = torch.device(options.device)
        self.found: dict[str, Any] = {}
        # bfloat16 is emulated on most CPUs, where only the path is tried.
        self.models: Models = build(
            options.model, self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32
        )
        self.files: list[Path] = []
        self.decoders = ProcessDecoders(options.decode_workers or best_processes())
        self.stage = DeviceResize(self.device)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return 60 * self.options.minutes - (time.perf_counter() - self.begun)

    def say(self, name: str, text: str, **values: Any) -> None:
        """Print one line, and write everything so far to the JSON file."""
        self.found[name] = values
        print(f"[{time.perf_counter() - self.begun:5.1f} s] {name}: {text}", flush=True)
        if self.options.json is not None:
            self.options.json.write_text(json.dumps(self.found, indent=2, default=str), encoding="utf-8")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rate(self, work: Callable[[], object], count: int, seconds: float) -> tuple[float, float, float]:
        """Median, lowest and highest of `count` per second over windows of about a third of `seconds`, after a warm-up."""
        work()
        self.wait()
        begun = time.perf_counter()
        work()
        self.wait()
        calls = max(1, round(seconds / 3 / max(1e-4, time.perf_counter() - begun)))
        rates = []
        for _ in range(3):
            begun = time.perf_counter()
            for _ in range(calls):
                work()
            self.wait()
            rates.append(count * calls / (time.perf_counter() - begun))
        return statistics.median(rates), min(rates), max(rates)


def facts(bench: Bench) -> None:
    """The machine, FLOPs of a pair, and the rate of matrix products."""
    device = bench.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype = bench.models.backend.dtype
    rate = matmul_rate(8192 if device.type == "cuda" else 256, dtype, device)
    image, text = bench.models.flops
    version, pairs = features.version_feature("libjpeg_turbo"), 1 / (image + text)
    bench.say(
        "machine",
        f"{name}, {default_workers()} threads for {os.cpu_count()} cores, torch {torch.__version__}, Pillow {pillow_version}, "
        f"libjpeg-turbo {version}; {dtype} matrix products {rate / 1e12:.1f} TFLOP/s; {image / 1e9:.1f} GFLOP per picture, "
        f"{text / 1e9:.1f} per prompt of full length: {CEILING * pairs:.0f} pairs/s at {CEILING / 1e12:.0f} TFLOP/s, "
        f"{rate * pairs:.0f} at the measured rate",
        matmul_flops=rate, flops_image=image, flops_text=text, gpu=name,
    )  # fmt: skip


def exactness(bench: Bench) -> None:
    """Pixels resized on the device against Pillow's, and scores of both ways in float32."""
    generator, gaps = np.random.default_rng(0), {}
    for rule in (Preprocess("clip_hf", 224), Preprocess("clip_tv", 224), Preprocess("hps_letterbox", 224)):
        stage = DeviceResize(bench.device)
        for width, height in ((1024, 1024), (1344, 768), (640, 480), (500, 1500), (224, 224)):
            pixels = (generator.random((height, width, 3)) * 256).astype(np.uint8)
            image, staged = Image.fromarray(pixels), None
            for _ in range(BEFORE + 1):
                staged = stage(image, {rule.key: rule}, b"picture")
            stage.wait()
            if staged is None:
                raise SystemExit(f"{rule.key} at {width}x{height} was not resized on the device")
            gap = (staged.pixels[rule.key].cpu().float() - rule.from_image(image).float()).abs().max()
            gaps[rule.id] = max(gaps.get(rule.id, 0.0), float(gap))
    pictures = [Image.fromarray(generator.integers(0, 256, (96, 128, 3), dtype=np.uint8)) for _ in range(24)]
    scorer = rewards.load("tiny-clip", device=str(bench.device), dtype="fp32")
    direct = rewards.load("tiny-clip", device="cpu", dtype="fp32").score(pictures, "a red circle")
    # Pictures from memory and unequal ones: as staged as files are. The CPU takes the ordinary way throughout.
    staged_scores = ScorerSet([scorer.backend])
    staged_scores.engine.reader.stage = DeviceResize(bench.device)
    values = staged_scores.score(pictures, "a red circle")["tiny-clip"]
    gap = float((values - direct).abs().max())
    words = ", ".join(f"{name} {value:g}" for name, value in gaps.items())
    bench.say(
        "exactness",
        f"largest difference of pixels (crops of 255, letterbox of 1): {words}; of tiny-clip scores in float32 against the "
        f"CPU's: {gap:.1e}",
        pixels=gaps, scores=gap,
    )  # fmt: skip
    if gaps["clip_hf"] or gaps["clip_tv"] or gaps["hps_letterbox"] > 1e-4 or gap > 1e-3:
        print("  these differences are larger than they may be", flush=True)


def encoders(bench: Bench) -> float:
    """The image encoder, and image and text encoder, on ready-made input; pairs per second at the best batch."""
    backend, best, size = bench.models.backend, 0.0, bench.models.backend.preprocess.size
    image_flops, text_flops = bench.models.flops
    for batch in bench.options.batches:
        pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=bench.device)
        ids = torch.randint(2, bench.models.words, (batch, backend.net.shape.context), device=bench.device)
        ids[:, -1] = bench.models.end

        def images(pixels: torch.Tensor = pixels) -> None:
            with torch.inference_mode():
                backend.encode_images(normalise(pixels, backend.mean, backend.std))

        def pairs(pixels: torch.Tensor = pixels, ids: torch.Tensor = ids) -> None:
            images(pixels)
            with torch.inference_mode():
                backend.net.embed_texts(ids)

        one, two = (bench.rate(work, batch, bench.options.seconds) for work in (images, pairs))
        best = max(best, two[0])
        rates = [one[0] * image_flops / 1e12, two[0] * (image_flops + text_flops) / 1e12]
        bench.say(
            f"encoders, batch {batch}",
            f"{one[0]:.0f} pictures/s ({one[1]:.0f} to {one[2]:.0f}; {rates[0]:.0f} TFLOP/s), {two[0]:.0f} pairs/s with 77-token "
            f"prompts ({two[1]:.0f} to {two[2]:.0f}; {rates[1]:.0f} TFLOP/s); hoped for {TARGETS['encoder']:.0f}",
            pictures=one, pairs=two,
        )  # fmt: skip
    return best


def plain_kernels(bench: Bench) -> None:
    """The image encoder without the kernels of `mmalign.rewards.kernels`, which run in inference mode alone."""
    backend, batch, size = bench.models.backend, bench.options.batches[-1], bench.models.backend.preprocess.size
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=bench.device)

    def images() -> None:
        with torch.no_grad():
            backend.encode_images(normalise(pixels, backend.mean, backend.std))

    found = bench.rate(images, batch, bench.options.seconds)
    text = f"{found[0]:.0f} pictures/s ({found[1]:.0f} to {found[2]:.0f})"
    bench.say("image encoder on torch's own kernels", text, pictures=found)


def compiled(bench: Bench) -> None:
    """The image encoder with compiled blocks."""
    if bench.options.no_compile or bench.left < bench.options.compile_seconds:
        print(f"compiled encoder: left out ({bench.left:.0f} s left)", flush=True)
        return
    backend, batch, size = bench.models.backend, bench.options.batches[-1], bench.models.backend.preprocess.size
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=bench.device)
    for block in backend.net.vision.blocks:  # all blocks are one program
        block.compile(dynamic=False)

    def images() -> None:
        with torch.inference_mode():
            backend.encode_images(normalise(pixels, backend.mean, backend.std))

    begun = time.perf_counter()
    try:
        images()
        bench.wait()
    except Exception as error:  # a missing compiler is a fact about the machine, not an end of the measurement
        bench.say("compiled encoder", f"does not compile here: {type(error).__name__}: {str(error)[:200]}")
        return
    spent = time.perf_counter() - begun
    found = bench.rate(images, batch, bench.options.seconds)
    bench.say(
        "compiled encoder",
        f"{found[0]:.0f} pictures/s ({found[1]:.0f} to {found[2]:.0f}) at batch {batch}; the first batch took {spent:.1f} s",
        pictures=found, first_batch_seconds=spent,
    )  # fmt: skip


def make_pictures(bench: Bench) -> None:
    """Distinct JPEGs of smooth noise, as hard to decode as photographs of their size."""
    side, begun = bench.options.side, time.perf_counter()

    def make(index: int) -> Path:
        generator = np.random.default_rng(index)
        coarse = Image.fromarray(generator.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        file = bench.place / f"{index:06d}.jpg"
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, quality=92)
        return file

    with ThreadPoolExecutor(default_workers()) as pool:
        bench.files = list(pool.map(make, range(bench.options.images)))
    size = statistics.mean(file.stat().st_size for file in bench.files)
    bench.say("pictures", f"{len(bench.files)} JPEGs of {side} x {side}, {size / 1e3:.0f} kB each, made in "
              f"{time.perf_counter() - begun:.1f} s", count=len(bench.files), bytes=size)  # fmt: skip


WAYS: tuple[tuple[str, bool, bool, bool], ...] = (
    ("processes, resized on the device", True, True, False),
    ("processes, resized there", True, False, False),
    ("threads, resized on the device", False, True, False),
    ("threads, resized there", False, False, False),
    ("processes, drafts at twice the size", True, False, True),
)
"""How pictures are read: in processes?, resized on the device?, decoded as drafts (which are other pixels)?"""


def scorers(bench: Bench, way: tuple[str, bool, bool, bool]) -> ScorerSet:
    """Fresh scorers that read in one of the ways; the processes are those of the whole benchmark."""
    _, in_processes, on_device, drafts = way
    backend = copy.copy(bench.models.backend)
    prepare_as([backend], decode="draft2x" if drafts else "full")
    made = ScorerSet([backend], workers=bench.options.workers)
    if in_processes:
        made.engine.workers = SLOTS_EACH * bench.decoders.processes
        made.engine.reader.decoders = bench.decoders
    made.engine.reader.stage = bench.stage if on_device else None
    return made


def reading(bench: Bench) -> None:
    """Reading, decoding and resizing alone, in every way."""
    few = bench.files[: max(8, len(bench.files) // 2)]
    bench.decoders.start(WHOLE_SLOT, bench.stage)
    for way in WAYS:
        engine = scorers(bench, way).engine
        with ThreadPoolExecutor(engine.workers) as pool:
            # Warm-up: processes that import, pinned memory, the comparison with Pillow.
            engine.reader.read(few[: 4 * max(BEFORE, bench.decoders.processes)], 0, pool)
            begun, cpu = time.perf_counter(), time.process_time()
            with ThreadPoolExecutor(AHEAD) as ahead:  # as the engine reads
                windows = [(few[start : start + 512], start) for start in range(0, len(few), 512)]
                list(ahead.map(lambda window, reader=engine.reader, pool=pool: reader.read(*window, pool), windows))
            wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        rate, each = len(few) / wall, 1000 * cpu / len(few)
        bench.say(
            f"reading, {way[0]}",
            f"{rate:.0f} pictures/s ({bench.decoders.processes} processes, or {engine.workers} threads), {each:.1f} ms of this "
            "process's processor time each",
            rate=rate, cpu_ms=each,
        )  # fmt: skip


def end_to_end(bench: Bench, encoder: float) -> float:
    """Files and prompts to scores, by the way that read fastest of those with exact pixels first. Returns pairs per second of the
    fastest one with exact pixels."""
    count, best = len(bench.files), 0.0
    short = [f"a red circle left of a blue square number {index}" for index in range(count)]
    long = [" ".join([f"a red circle and {index} blue squares"] * 24) for index in range(count)]
    exact = sorted((way for way in WAYS if not way[3]), key=lambda way: -bench.found[f"reading, {way[0]}"]["rate"])
    drafts = [way for way in WAYS if way[3]]
    ways = [("short prompts", short, exact[0]), ("77-token prompts", long, exact[0]),
            *(("short prompts", short, way) for way in [*exact[1:], *drafts])]  # fmt: skip
    for label, prompts, way in ways[: bench.options.ways]:
        if bench.left < 0:
            print(f"end to end, {label}, {way[0]}: left out, the time is up", flush=True)
            continue
        scorers(bench, way).score(bench.files[:16], prompts[:16], batch_size=bench.options.batch)  # warm-up
        fresh = scorers(bench, way)
        bench.wait()
        begun = time.perf_counter()
        values = fresh.score(bench.files, prompts, batch_size=bench.options.batch)["pickscore"]
        wall = time.perf_counter() - begun
        if not bool(values.isfinite().all()):
            raise SystemExit("scores are not finite")
        counters = fresh.engine.counters
        encoded = sum(counters.images_encoded.values()), sum(counters.texts_encoded.values())
        if encoded != (count, count):
            raise SystemExit(f"{encoded} encodings for {count} distinct pictures and prompts")
        best = max(best, 0.0 if way[3] else count / wall)
        rate, waited = count / wall, counters.decode_wait_seconds / wall
        bench.say(
            f"end to end, {label}, {way[0]}",
            f"{rate:.0f} pictures/s ({100 * rate / encoder:.0f} % of the encoders' pairs/s; waited {waited:.0%} of the time for "
            f"pictures); hoped for {TARGETS['end to end']:.0f}",
            rate=rate, of_encoders=rate / encoder, wait=waited,
        )  # fmt: skip
    return best


def loop(bench: Bench, best: float) -> None:
    """One picture at a time through transformers, as the packages' examples do, and what ours is against that."""
    for label, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        if bench.left < -20:
            print(f"loop in {label}: left out, the time is up", flush=True)
            continue
        score = bench.models.snippet(dtype)
        few = bench.files[: bench.options.loop]
        prompts = [f"a red circle left of a blue square number {index}" for index in range(len(few))]
        values = [score(file, text) for file, text in zip(few, prompts, strict=True)]  # also the warm-up
        bench.wait()
        begun = time.perf_counter()
        for file, text in zip(few, prompts, strict=True):
            score(file, text)
        rate = len(few) / (time.perf_counter() - begun)
        ours = ScorerSet([bench.models.backend]).score(few, prompts)["pickscore"]
        gap = float((ours - torch.tensor(values)).abs().max()) / bench.models.scale
        bench.say(
            f"loop in {label}",
            f"{rate:.1f} pictures/s; end to end ours is {best / rate:.1f} times that; cosines differ by up to {gap:.1e} (ours in "
            f"{bench.models.backend.dtype})",
            rate=rate, ours_over_loop=best / rate, cosine_gap=gap,
        )  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="parts that would begin later are left out")
    parser.add_argument("--model", choices=["vit-h", "vit-l", "tiny"], default="vit-h")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=3072)
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--batch", type=int, default=256, help="end to end")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 256], help="of the encoders alone")
    parser.add_argument("--seconds", type=float, default=3.0, help="per figure of the encoders alone")
    parser.add_argument("--workers", type=int, default=None, help="threads; one per core by default")
    parser.add_argument("--decode-workers", type=int, default=None, help="processes; one per core but two by default")
    parser.add_argument("--ways", type=int, default=None, help="end to end only this many times, the fastest ways first")
    parser.add_argument("--loop", type=int, default=32, help="pictures of the loop")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--compile-seconds", type=float, default=25.0, help="left over at least, or compilation is left out")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parse(arguments)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(options, Path(place))
        facts(bench)
        exactness(bench)
        encoder = encoders(bench)
        plain_kernels(bench)
        make_pictures(bench)
        reading(bench)
        best = end_to_end(bench, encoder)
        bench.decoders.close()
        loop(bench, best)
        command(bench, encoder)
        compiled(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
