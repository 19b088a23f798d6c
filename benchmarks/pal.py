"""PAL on simulated voters: mixtures of ideal points against one head for everybody, on pairs that no fit has seen.

    python benchmarks/pal.py --seeds 0 1 2 --out runs/pal-benchmark          # everything, then the tables and the plot
    python benchmarks/pal.py --seeds 1 --worlds groups --out ...             # one part; parts that are there are not made again
    python benchmarks/pal.py --tables --out ... --plot docs/images/pal.svg   # tables and plot of what is there

Voters choose among pictures of the shape world (pal_world.py). Tables of pairs with user names go through the ordinary commands'
functions: `fit-pal` on tiny-clip's vectors with one prototype and with several, then `test-pal` on other prompts and other
pictures, for known voters and for voters never seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pal_world as sim

from mmalign.rewards.pal.settings import HeadConfig, PalConfig, PalOptimConfig
from mmalign.scoring.pal import fit_pal
from mmalign.scoring.pal_users import measure_pal
from mmalign.statistics import Interval, mean_interval

SHOTS = (0, 4, 8, 16, 32)
PROTOTYPES = 4
VOTERS, NEW_VOTERS = 60, 24
TRAIN_PROMPTS, TEST_PROMPTS = 400, 250
VARIANTS = ("b", "a")
IDEAL_POINTS_IN = ("groups",)
"""Worlds in which PAL-A, which reads no prompt, is fitted too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worlds", nargs="+", default=list(sim.WORLDS), choices=sim.WORLDS)
    parser.add_argument("--out", type=Path, default=Path("runs/pal-benchmark"), help="folder of the parts' results")
    parser.add_argument("--plot", type=Path, help="SVG to write")
    parser.add_argument("--user-prior", type=float, default=PalOptimConfig().user_prior, help="of the fits")
    parser.add_argument("--tables", action="store_true", help="make no part, only the tables")
    asked = parser.parse_args()
    if not asked.tables:
        asked.out.mkdir(parents=True, exist_ok=True)
        for seed in asked.seeds:
            run_seed(seed, [world for world in asked.worlds if not part_file(asked.out, world, seed).exists()], asked.out,
                     asked.user_prior)  # fmt: skip
    found = [json.loads(file.read_text()) for file in sorted(asked.out.glob("pal-*.json"))]
    if not found:
        sys.exit(f"{asked.out}: no results")
    print(tables(found))
    if asked.plot is not None:
        asked.plot.parent.mkdir(parents=True, exist_ok=True)
        asked.plot.write_text(plot(found))


def part_file(out: Path, world: str, seed: int) -> Path:
    return out / f"pal-{world}-{seed}.json"


def run_seed(seed: int, worlds: Sequence[str], out: Path, user_prior: float) -> None:
    """All worlds of one seed share the pictures; voters and votes are each world's own."""
    if not worlds:
        return
    train, test = sim.make_pool(TRAIN_PROMPTS, seed, "train"), sim.make_pool(TEST_PROMPTS, seed, "test")
    for world in worlds:
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            result = run_world(world, seed, (train, test), Path(folder), user_prior)
        result["cpu_seconds"] = round(time.process_time() - start, 1)
        part_file(out, world, seed).write_text(json.dumps(result, indent=1))
        print(f"{world}, seed {seed}: {result['cpu_seconds']} s", flush=True)


def run_world(
    world: str, seed: int, pools: tuple[sim.Pool, sim.Pool], folder: Path, user_prior: float
) -> dict[str, Any]:
    train, test = pools
    known, new = sim.tastes(world, VOTERS, seed, "known"), sim.tastes(world, NEW_VOTERS, seed, "new")
    votes = {
        "train": (train, sim.vote(train, known, sim.VOTES_PER_VOTER, seed, f"{world}/train"), "known"),
        "known": (test, sim.vote(test, known, sim.VOTES_PER_VOTER, seed, f"{world}/known"), "known"),
        "new": (test, sim.vote(test, new, sim.NEW_VOTES, seed, f"{world}/new"), "new"),
    }
    for name, (pool, cast, prefix) in votes.items():
        sim.write_votes(folder / name, pool, cast, prefix)
    sure = {name: cast.certain for name, (_, cast, _) in votes.items()}
    result: dict[str, Any] = {"world": world, "seed": seed, "certain": sure, "arms": {}}
    for variant in VARIANTS:
        if variant == "a" and world not in IDEAL_POINTS_IN:
            continue
        config = PalConfig(
            encoder="tiny-clip", pairs=str(folder / "train"), out=str(folder / f"pal-{variant}"), seed=seed, device="cpu",
            head=HeadConfig(variant=variant, prototypes=PROTOTYPES), optim=PalOptimConfig(user_prior=user_prior),
        )  # fmt: skip
        report = fit_pal(config, progress=False)
        train_accuracy = {name: row["train"] for name, row in report.rows.items()}
        seen = measure_pal(config.out, folder / "known", shots=(), device="cpu", progress=False)
        unseen = measure_pal(config.out, folder / "new", shots=SHOTS, seed=seed, device="cpu", progress=False)
        for arm in seen.known:
            if arm == "encoder" and variant != VARIANTS[0]:
                continue
            label = arm if arm == "encoder" else f"{variant}, {arm}"
            result["arms"][label] = {
                "train": train_accuracy[arm], "known": seen.known[arm].micro, "known_by_user": seen.known[arm].by_user,
                "new": {n: row.micro for n, row in unseen.new[arm].items()},
                "new_by_user": {n: row.by_user for n, row in unseen.new[arm].items()},
            }  # fmt: skip
    return result


# ---------------------------------------------------------------------- what is printed


def pooled(found: Sequence[dict[str, Any]], world: str, arm: str, *path: str) -> np.ndarray:
    """Accuracies of all users of all seeds."""
    values: list[float] = []
    for part in found:
        if part["world"] == world and arm in part["arms"]:
            value: Any = part["arms"][arm]
            for key in path:
                value = value[key]
            values += value
    return np.array(values)


def told(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Means over users of all seeds with 95 % intervals over users, and differences from the head with one prototype."""
    lines = []
    for world in sim.WORLDS:
        parts = [part for part in found if part["world"] == world]
        if not parts:
            continue
        sure = np.mean([part["certain"]["known"] for part in parts])
        seeds = ", ".join(str(part["seed"]) for part in parts)
        lines += [f"\n{world} (seeds {seeds}; choices that follow the voter's own utility: {100 * sure:.1f} %)\n"]
        shots = list(parts[0]["arms"]["encoder"]["new"])
        lines += ["| head | train | known voters, other pairs | " + " | ".join(f"new, {n} pairs" for n in shots) + " |"]
        lines += ["|---" * (3 + len(shots)) + "|"]
        for arm in parts[0]["arms"]:
            seen = told(mean_interval(pooled(found, world, arm, "known_by_user")))
            new = [f"{100 * pooled(found, world, arm, 'new_by_user', n).mean():.1f}" for n in shots]
            train = np.mean([part["arms"][arm]["train"] for part in parts])
            lines.append(f"| {arm} | {100 * train:.1f} | {seen} | " + " | ".join(new) + " |")
        for variant in VARIANTS:
            if variant == "a" and world not in IDEAL_POINTS_IN:
                continue
            one, many = f"{variant}, one prototype", f"{variant}, {PROTOTYPES} prototypes"
            gain = pooled(found, world, many, "known_by_user") - pooled(found, world, one, "known_by_user")
            words = [f"known {told(mean_interval(gain))}"]
            for n in shots:
                gain = pooled(found, world, many, "new_by_user", n) - pooled(found, world, one, "new_by_user", n)
                words.append(f"{n}: {told(mean_interval(gain))}")
            lines.append(f"\n{many} minus one prototype, points: " + "; ".join(words))
    return "\n".join(lines)


SHOWN = {
    "encoder": ("the encoder alone", "#78716c"),
    "b, one prototype": ("one head for everybody (K = 1)", "#b45309"),
    f"b, {PROTOTYPES} prototypes": (f"mixture (PAL-B, K = {PROTOTYPES})", "#1d4ed8"),
}
WIDTH, HEIGHT, LEFT, TOP = 300, 250, 46, 40
LOW, HIGH = 0.45, 0.9


def plot(found: Sequence[dict[str, Any]]) -> str:
    """Accuracy on a new voter's other pairs against the number of pairs fitted, one panel a world."""
    worlds = [world for world in sim.WORLDS if any(part["world"] == world for part in found)]
    total = LEFT + len(worlds) * WIDTH
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {HEIGHT + 92}" font-family="system-ui, sans-serif" '
        f'font-size="12">',
        f'<rect width="{total}" height="{HEIGHT + 92}" fill="#fff"/>',
    ]
    for number, world in enumerate(worlds):
        out += panel(found, world, LEFT + number * WIDTH, first=number == 0)
    words = "pairs of a new voter that were fitted (bars: 95 % over voters of all seeds)"
    out.append(f'<text x="{total / 2}" y="{HEIGHT + 40}" text-anchor="middle" fill="#57534e">{words}</text>')
    at = LEFT
    for words, colour in (*SHOWN.values(), ("the voter's own utility", "#a8a29e")):
        out.append(line(at, HEIGHT + 68, at + 24, HEIGHT + 68, colour, 2, dashed=colour == "#a8a29e"))
        out.append(f'<text x="{at + 30}" y="{HEIGHT + 72}">{words}</text>')
        at += 48 + 7 * len(words)
    return "\n".join([*out, "</svg>", ""])


def y_of(value: float) -> float:
    return TOP + (HEIGHT - 40) * (HIGH - value) / (HIGH - LOW)


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="4 4"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"{dashes}/>'
    )


def panel(found: Sequence[dict[str, Any]], world: str, start: float, *, first: bool) -> list[str]:
    """One world: a line and an interval per arm and number of pairs."""
    parts = [part for part in found if part["world"] == world]
    shots = list(parts[0]["arms"]["encoder"]["new"])
    end = start + WIDTH - 36
    out = [f'<text x="{start + 10}" y="24" font-size="14" font-weight="600">{world}</text>']
    for level in (0.5, 0.6, 0.7, 0.8):
        out.append(line(start, y_of(level), end, y_of(level), "#e7e5e4"))
        if first:
            out.append(f'<text x="{start - 8}" y="{y_of(level) + 4:.1f}" text-anchor="end" fill="#57534e">{level:.0%}</text>')
    sure = y_of(float(np.mean([part["certain"]["new"] for part in parts])))
    out.append(line(start, sure, end, sure, "#a8a29e", dashed=True))
    places = {n: start + 12 + (WIDTH - 60) * place / max(1, len(shots) - 1) for place, n in enumerate(shots)}
    for arm, (_, colour) in SHOWN.items():
        intervals = {n: mean_interval(pooled(found, world, arm, "new_by_user", n)) for n in shots}
        points = " ".join(f"{places[n]:.1f},{y_of(interval.mean):.1f}" for n, interval in intervals.items())
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for n, interval in intervals.items():
            out.append(line(places[n], y_of(interval.low), places[n], y_of(interval.high), colour, 1.2))
            out.append(f'<circle cx="{places[n]:.1f}" cy="{y_of(interval.mean):.1f}" r="3.2" fill="{colour}"/>')
    out += [
        f'<text x="{x:.1f}" y="{HEIGHT + 18}" text-anchor="middle" fill="#57534e">{n}</text>' for n, x in places.items()
    ]
    return out


if __name__ == "__main__":
    main()
