"""A DPO step on a random Qwen2.5-VL of 3 B parameters' proportions on one GPU, in about two minutes.

    python benchmarks/vlm_gpu.py --minutes 2 --json out.json
    python benchmarks/vlm_gpu.py --device cpu --scale-down 16 --pixels 224       # tries the path, its figures mean nothing

Pictures of 2128 px (5,776 tokens), answers of 64 to 128 tokens, bfloat16, rank-16 adapters on the language model, activation
checkpointing, reference by adapters off. Weights are drawn on the device. Sides:

    TRL            its DPOTrainer, where it can be imported
    two sequences  a plain loop over transformers: both sequences in full, logits of the answers alone
    ours           shared prompt, vision tower once
    ours, cached   vision features and reference log-probabilities stored beforehand
    our tower      as two sequences, with the vision tower's windows computed together as ours are
    ours, flex     as ours, with FlexAttention
    ours, kept     as ours, cached, without activation checkpointing: what the memory that sharing frees is good for

Every side starts from the same shifted adapter and its first loss, on the same pair, is told: they differ by the rounding of
bfloat16 (exact agreement in float32 is what benchmarks/vlm_dpo.py and the tests hold the step to). All batches lie on the
device before anything is timed, as behind a loader that keeps up; what making them costs the CPU is told apart. A side that
does not fit or does not run is a line of the table, not an end. What MFU counts: benchmarks/vlm_flops.py.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from dpo_measure import _peak, _resident, _settle, _start_peak
from flops import matmul_rate
from vlm_flops import Shape, pair_flops
from vlm_models import pairs, qwen_parts
from vlm_sides import Ours, Side, Trl, TwoSequences, shift

from mmalign.models.vlm import VLM_FAMILIES
from mmalign.models.vlm.base import VlmConfig, VlmFamily
from mmalign.models.vlm.kernels import SEGMENTS
from mmalign.models.vlm.loading import assemble, cast_weights, use_kernel

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s of a device by a part of its name; others are held against a matrix product."""
BASELINES = ("TRL", "two sequences", "our tower")
NAMES = ("TRL", "ours", "ours, cached", "our tower", "two sequences", "ours, flex", "ours, kept")
FAILURES = (RuntimeError, ValueError, ImportError, OSError, TypeError, AttributeError)
"""What a side may end with; out of memory is a RuntimeError."""


@dataclass
class Bench:
    """The model on its device, and what has been found out so far."""

    found: argparse.Namespace
    scratch: Path
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.device = torch.device(self.found.device)
        self.dtype = "bf16" if self.device.type == "cuda" or self.found.bf16 else "fp32"
        config, self.processor = qwen_parts(self.found.scale_down)
        self.note("drawing weights on the device")
        from transformers import Qwen2_5_VLForConditionalGeneration

        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            torch.manual_seed(0)
            network = Qwen2_5_VLForConditionalGeneration(config)
        if self.dtype == "bf16":
            cast_weights(network, torch.bfloat16)
        self.plain: Any = network.eval().requires_grad_(False)
        self.parameters = sum(value.numel() for value in network.parameters())
        self.shape = Shape.of(network)
        self.note(f"{self.parameters / 1e9:.2f} B parameters; pairs")
        self.records = pairs(self.found.pairs, self.found.pixels)
        begun = time.process_time()
        examples = [self.family(None).encode(record) for record in self.records]
        self.cpu_seconds = (time.process_time() - begun) / len(self.records)
        rows = [example.rows[0] for example in examples]
        self.prefixes = [len(row.prefix) for row in rows]
        self.lengths = [tuple(map(len, row.branches)) for row in rows]
        self.patches = [int(row.units[0].tensors["pixel_values"].shape[0]) for row in rows]

    def note(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:6.1f} s] {text}", flush=True)

    @property
    def left(self) -> float:
        return float(60 * self.found.minutes - (time.monotonic() - self.begun))

    def family(self, network: Any, *, attention: str = "sdpa", checkpointing: bool = True) -> VlmFamily:
        """A family around a network; None: around the one that every side is copied from, for tokens alone."""
        cls: Any = VLM_FAMILIES.get("qwen2_5_vl")
        settings: dict[str, Any] = {"dtype": self.dtype, "attention": attention, "gradient_checkpointing": checkpointing}
        config = VlmConfig(name="qwen2_5_vl", path="drawn", **settings)
        made: VlmFamily = cls(config, self.device)
        made.processor, made.tokenizer = self.processor, self.processor.tokenizer
        if network is None:
            made.network = self.plain
            made.end_ids, made.end_marks = frozenset({made.tokenizer.eos_token_id}), (made.tokenizer.eos_token,)
            made.placeholder_ids = frozenset()
            return made
        return assemble(made, network)

    def copied(self) -> Any:
        return copy.deepcopy(self.plain)

    def make(self, name: str) -> Side:
        """A side with a network of its own."""
        common: dict[str, Any] = {"dtype": self.dtype, "ahead": True}
        if name in ("two sequences", "our tower"):
            family = self.family(self.copied())
            network = self.copied()
            if name == "our tower":
                use_kernel([network.model.visual], SEGMENTS)
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return TwoSequences(family, network, self.records, self.device)
        if name == "TRL":
            start = Ours(self.family(self.copied()), self.records[:1], 1, self.device, checkpointing=True, **common)
            shift(start.policy)
            targets = start.family.lora_targets["language"]
            return Trl((self.copied(), self.processor), self.records, 1, self.device, start=start.policy,
                       scratch=self.scratch / "trl", targets=targets, checkpointing=True, **common)  # fmt: skip
        checkpointing = name != "ours, kept"
        network = self.copied()
        if name == "ours, flex":
            network.config.get_text_config()._attn_implementation = "flex_attention"
        family = self.family(network, attention="flex" if name == "ours, flex" else "sdpa", checkpointing=checkpointing)
        cached = name in ("ours, cached", "ours, kept")
        made = Ours(family, self.records, 1, self.device, checkpointing=checkpointing, cached=cached, **common)
        shift(made.policy)
        return made

    def flops(self, name: str) -> float:
        """Of one pair, the mean over the pairs."""
        plain, cached = name in BASELINES, name in ("ours, cached", "ours, kept")
        return statistics.mean(
            pair_flops(self.shape, patches=patches, prefix=prefix, lengths=lengths, shared=not plain,
                       encodes=0 if cached else 4 if plain else 1, reference=not cached)
            for patches, prefix, lengths in zip(self.patches, self.prefixes, self.lengths, strict=True)
        )  # fmt: skip


def weigh(bench: Bench, name: str, rows: dict[str, dict[str, Any]]) -> Side | None:
    """Build a side and take two steps: its memory, its first loss, or why it does not run."""
    bench.note(f"{name}: building")
    device, side = bench.device, None
    row = rows.setdefault(name, {})
    try:
        gc.collect()
        _settle(device)
        before = _resident(device) or 0
        side = bench.make(name)
        gc.collect()
        row["models"] = (_resident(device) or 0) - before
        row["first_step_seconds"], row["first_loss"] = timed(side)
        seen = _start_peak(device)
        row["second_step_seconds"], _ = timed(side)
        peak = _peak(device) if seen else None
        row["peak"] = None if peak is None else peak - before
    except torch.OutOfMemoryError as error:
        row["failed"] = f"out of memory: {str(error).splitlines()[0]}"
    except FAILURES as error:
        row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    if "failed" in row:
        bench.note(f"{name}: {row['failed']}")
        side = None
        gc.collect()
        _settle(device)
        return None
    first = row["first_step_seconds"]
    bench.note(f"{name}: first loss {row['first_loss']:.4f}, peak {_gib(row['peak'])} GiB, first step {first:.1f} s")
    return side


def timed(side: Side) -> tuple[float, float]:
    """Seconds of one step, and its loss."""
    begun = time.monotonic()
    loss = side.step()
    if side.device.type == "cuda":
        torch.cuda.synchronize(side.device)
    return time.monotonic() - begun, loss


def measure(bench: Bench, sides: dict[str, Side], rows: dict[str, dict[str, Any]]) -> None:
    """Windows of every side in turn until the time is used up, one at least; pairs per second of each window.

    A side whose one step takes longer than half of what is left keeps the time of its second step.
    """
    slow = [name for name in sides if rows[name]["second_step_seconds"] > max(0.0, bench.left) / 2 and len(sides) > 1]
    for name in slow:
        speed = 1 / rows[name]["second_step_seconds"]
        rows[name] |= {"pairs_per_second": {"median": speed, "low": speed, "high": speed}, "windows": 0}
    sides = {name: side for name, side in sides.items() if name not in slow}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    cost = 0.0
    if not sides:
        return
    while cost == 0 or (bench.left > cost + 2 and len(next(iter(speeds.values()))) < bench.found.repeats):
        begun = time.monotonic()
        names = list(sides) if len(next(iter(speeds.values()))) % 2 == 0 else list(reversed(sides))
        for name in names:
            speeds[name].append(sides[name].run(bench.found.seconds))
        cost = time.monotonic() - begun
        bench.note("pairs/s: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in speeds.items()))
    for name, values in speeds.items():
        if values:
            rows[name]["pairs_per_second"] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
            rows[name]["windows"] = len(values)


def summarise(bench: Bench, rows: dict[str, dict[str, Any]], rate: float) -> dict[str, Any]:
    """Ratios and MFU of what ran."""
    name_of_device = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    peak = next((value for part, value in PEAKS.items() if part in name_of_device), rate)
    for name, row in rows.items():
        row["flops"] = bench.flops(name)
        if "pairs_per_second" not in row:
            continue
        row["mfu"] = row["flops"] * row["pairs_per_second"]["median"] / peak
        for base in BASELINES:
            against = rows.get(base, {})
            if name not in BASELINES and "pairs_per_second" in against:
                row[f"speed over {base}"] = row["pairs_per_second"]["median"] / against["pairs_per_second"]["median"]
                row[f"flops of {base} over its own"] = bench.flops(base) / row["flops"]
                if row["peak"] and against["peak"]:
                    row[f"peak over {base}"] = row["peak"] / against["peak"]
    return {
        "device": name_of_device, "torch": torch.__version__, "transformers": _version("transformers"), "trl": _version("trl"),
        "parameters": bench.parameters, "dtype": bench.dtype, "prompt_tokens": statistics.mean(bench.prefixes),
        "answer_tokens": sorted(length for pair in bench.lengths for length in pair), "patches": bench.patches[0],
        "peak_flops": peak, "matmul_flops": rate, "cpu_seconds_per_pair_of_encoding": bench.cpu_seconds, "sides": rows,
        "seconds": time.monotonic() - bench.begun,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['device']}, torch {found['torch']}, {found['parameters'] / 1e9:.2f} B parameters in {found['dtype']}, prompt "
        f"{found['prompt_tokens']:.0f} tokens, answers {found['answer_tokens'][0]}-{found['answer_tokens'][-1]}; matrix product "
        f"{found['matmul_flops'] / 1e12:.1f} TFLOP/s, MFU against {found['peak_flops'] / 1e12:.0f}",
        f"{'side':<15}{'loss 1':>8}{'pairs/s':>9}{'low-high':>16}{'x TRL':>8}{'x two seq.':>11}{'x our tower':>12}"
        f"{'TFLOP/pair':>11}{'MFU':>7}{'peak GiB':>10}{'of TRL':>8}",
    ]  # fmt: skip
    for name, row in found["sides"].items():
        if "pairs_per_second" not in row:
            lines.append(f"{name:<15} {row.get('failed', 'not timed: out of time')}")
            continue
        speed = row["pairs_per_second"]

        def ratio(key: str, row: dict[str, Any] = row) -> str:
            return f"{row[key]:.2f}" if key in row else "-"

        lines.append(
            f"{name:<15}{row['first_loss']:>8.4f}{speed['median']:>9.3f}{speed['low']:>8.3f}-{speed['high']:<7.3f}"
            f"{ratio('speed over TRL'):>8}{ratio('speed over two sequences'):>11}"
            f"{ratio('speed over our tower'):>12}{row['flops'] / 1e12:>11.1f}"
            f"{row['mfu']:>7.1%}{_gib(row['peak']):>10}"
            f"{ratio('peak over TRL'):>8}"
        )  # fmt: skip
    return "\n".join(lines)


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.1f}"


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run(found: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain data."""
    with tempfile.TemporaryDirectory(prefix="mmalign-vlm-gpu-") as scratch:
        bench = Bench(found, Path(scratch))
        on_gpu = bench.device.type == "cuda"
        rate = matmul_rate(8192 if on_gpu else 512, torch.bfloat16 if on_gpu else torch.float32, bench.device)
        bench.note(f"matrix product {rate / 1e12:.2f} TFLOP/s; making a pair's batch takes {bench.cpu_seconds:.2f} CPU s")
        rows: dict[str, dict[str, Any]] = {}
        sides: dict[str, Side] = {}
        for name in NAMES:
            if name in found.skip:
                continue
            if bench.left < 0.4 * 60 * found.minutes and "ours, cached" in sides:
                bench.note(f"{name}: left out, so that the others can be timed")
                continue
            made = weigh(bench, name, rows)
            if made is not None:
                sides[name] = made
        if sides:
            measure(bench, sides, rows)
        return summarise(bench, rows, rate)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--minutes", type=float, default=2.0, help="time for everything, creation of the model included")
    parser.add_argument("--pixels", type=int, default=2128, help="width and height of a picture")
    parser.add_argument("--pairs", type=int, default=2, help="distinct pairs to go round")
    parser.add_argument("--repeats", type=int, default=7, help="most windows of every side, in turns")
    parser.add_argument("--seconds", type=float, default=1.0, help="least length of a window")
    parser.add_argument("--skip", nargs="*", default=[], choices=NAMES, help="sides to leave out")
    parser.add_argument("--scale-down", type=int, default=1, metavar="N", help="divide widths and depths by N")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 on a CPU as well")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every figure to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, tick: Callable[[str], None] = print) -> int:
    found = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if found.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    result = run(found)
    tick(table(result))
    tick(json.dumps(result))
    if found.json:
        found.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
