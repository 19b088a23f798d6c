"""Selectivity of learned freeze masks in the embedded world, against random masks and one-shot saliency of equal share.

    python benchmarks/freezing_selectivity.py --jobs 2          # chooses the weight, measures, prints
    python benchmarks/freezing_selectivity.py --print           # prints what is there
    python benchmarks/freezing_selectivity.py --only choose     # the first part

Three groups of persons and papers that share nobody. Masks are learnt on the first. `choose` sets how much an innocent user's
cost counts by users of the second (benchmarks/freezing_choice.py has the rule). `measure` lets users fine-tune on the third and
scores them there: per seed and ratio, of tensors and of parameters, the learned mask; saliency masks with as many tensors and as
many parameters frozen; and random masks with as many of both. Every finished arm is a file below --out: a killed run continues
where it stopped, and processes that are given the same folder share the work.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import freezing_choice as choice
import numpy as np
from filelock import FileLock, Timeout
from freezing_study import Scheme, World, second_group, third_group
from freezing_tables import Arm, echo, sweep, tables

from mmalign.errors import MmalignError
from mmalign.freezing import FreezeMask

HERE = Path(__file__).resolve()


COUNTS = ("tensors", "parameters")


def arms(world: World, rules: Mapping[str, str], ratio: float, seed: int, matched: int, count: str) -> list[Arm]:
    """Every mask of one cell, made when it is asked for; the first is the learned one.

    Args:
        rules: the rule of the innocent weight, by scheme.
        count: what the ratio is of. Of tensors: saliency with as many tensors, and with as many parameters. Of parameters:
            saliency by score per parameter, as mask learning chooses then, and by score alone.
    """
    weights = {name: choice.weight_of(rule, ratio) for name, rule in rules.items()}
    best = Scheme(name="learned", weight=weights["learned"], count=count)
    once = Scheme(name="saliency", weight=1.0)
    like = best.key(ratio)

    def learned() -> FreezeMask:
        return world.scored(best, ratio=ratio, seed=seed)

    def plain(scheme: Scheme) -> Callable[[], FreezeMask]:
        choose = world.by_tensors if count == "tensors" else world.by_density
        return lambda: choose(scheme, ratio=ratio, seed=seed)

    def share(scheme: Scheme) -> Callable[[], FreezeMask]:
        return lambda: world.by_share(scheme, learned(), ratio=ratio, seed=seed)

    def chance(number: int) -> Callable[[], FreezeMask]:
        return lambda: world.by_chance(learned(), seed=100 * seed + number)

    found = [Arm("learned", like, learned)]
    words = ("as many tensors", "as many parameters") if count == "tensors" else ("by score per parameter", "by score")
    key = f"saliency-w1-r{ratio:g}"
    found.append(Arm(f"saliency, {words[0]}", f"{key}-{count}", plain(once)))
    found.append(Arm(f"saliency, {words[1]}", f"{key}-share-of-{like}", share(once)))
    if weights.get("saliency", 1.0) != 1.0:  # one more of another weight
        other = Scheme(name="saliency", weight=weights["saliency"])
        key = f"saliency-w{other.weight:.4g}-r{ratio:g}"
        found.append(Arm(f"saliency of weight {other.weight:g}, {words[0]}", f"{key}-{count}", plain(other)))
    return found + [Arm("random, as many of both", f"random-{number}-like-{like}", chance(number)) for number in range(matched)]


Job = tuple[Path, Callable[[], bool], Callable[[], object]]
"""A file to lock, whether it is done, and how to do it."""


class Run:
    """The command's work."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)
        self.choice = second_group(self.out, options.user_steps, options.shortened)
        self.world = third_group(self.choice, self.out)

    def record(self) -> dict[str, Any]:
        """The choice: made once, so that processes that share the work agree on it."""
        file = self.out / "choice.json"
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                choice.choose(self.out, self.options.ratios, self.options.schemes, self.options.seeds, self.choice)
        return dict(json.loads(file.read_text()))

    def rules(self) -> dict[str, str]:
        """What is measured with: what was chosen, or what the command line says, then for saliency as well."""
        if self.options.weight is not None:
            return dict.fromkeys(choice.SCHEMES, self.options.weight)
        return {name: found["chosen"] for name, found in self.record().items() if name in choice.SCHEMES}

    def choosing(self) -> Iterator[Job]:
        """Users without a mask, which the others need, then every trial."""
        for seed in self.options.seeds:
            yield from self._plain(self.choice, seed)
        for trial in choice.trials(self.options.ratios, self.options.schemes, self.options.seeds):
            yield self._job(self.choice, trial.name, trial.seed, functools.partial(trial.selectivity, self.choice))

    def measuring(self) -> Iterator[Job]:
        """Of every cell the learned mask before those that are matched with it."""
        rules = self.rules()
        cells = [(seed, ratio) for seed in self.options.seeds for ratio in self.options.ratios]
        for seed in self.options.seeds:
            yield from self._plain(self.world, seed)
        for count, first in itertools.product(self.options.counts, (True, False)):
            for seed, ratio in cells:
                found = arms(self.world, rules, ratio, seed, self.options.matched, count)
                for arm in found[:1] if first else found[1:]:
                    yield self._job(self.world, arm.name, seed, functools.partial(self.world.losses, arm.name, arm.mask, seed))

    def _plain(self, world: World, seed: int) -> Iterator[Job]:
        yield self._job(world, "full", seed, functools.partial(world.plain, seed))

    @staticmethod
    def _job(world: World, name: str, seed: int, do: Callable[[], object]) -> Job:
        return world.folder / "locks" / f"{name}-seed{seed}.lock", functools.partial(world.done, name, seed), do

    def all(self) -> None:
        """Both parts, or the one that is asked for."""
        if self.options.only in (None, "choose") and not (self.out / "choice.json").is_file():
            share(list(self.choosing()))
            self.record()
        if self.options.only in (None, "measure"):
            share(list(self.measuring()))

    def show(self) -> str:
        """The tables of all masks that are finished for every seed, and of ratios where the learned one is."""
        record, rules, parts = self.record(), self.rules(), []
        for count in self.options.counts:
            cells = {
                (ratio, seed): arms(self.world, rules, ratio, seed, self.options.matched, count)
                for ratio in self.options.ratios for seed in self.options.seeds
            }  # fmt: skip
            kept = {
                (ratio, seed): [arm for place, arm in enumerate(found)
                                if all(self.world.done(cells[ratio, other][place].name, other) for other in self.options.seeds)]
                for (ratio, seed), found in cells.items()
            }  # fmt: skip
            whole = {key: found for key, found in kept.items() if len(found) > 1 and found[0].label == "learned"}
            name = count + ("" if self.options.weight is None else f"-{self.options.weight.replace('/', '_')}")
            parts.append(f"Ratios of {count}:\n\n" + tables(self.world, whole, self.options.ratios, name=name))
        return choice.text_of(record) + "\n\n" + "\n\n".join(parts)


def share(jobs: list[Job]) -> None:
    """Do what nobody else is doing, and wait for the rest; a process that dies leaves its job to the others."""
    while jobs:
        left = []
        for lock, done, do in jobs:
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(lock, timeout=0):
                    if not done():
                        do()
            except Timeout:
                left.append((lock, done, do))
        jobs = left
        time.sleep(0.5 if jobs else 0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/freezing-selectivity")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--matched", type=int, default=1, help="random masks per seed and ratio")
    parser.add_argument("--user-steps", type=int, default=30)
    parser.add_argument("--shortened", type=int, default=1, help="divide mask learning by this, to try the path")
    every = list(choice.SCHEMES)
    parser.add_argument("--schemes", nargs="+", choices=every, default=every, help="whose weight is chosen")
    parser.add_argument("--weight", choices=list(choice.RULES), help="measure with this innocent weight, not the chosen one")
    parser.add_argument("--counts", nargs="+", choices=COUNTS, default=list(COUNTS), help="what ratios are of")
    parser.add_argument("--only", choices=["choose", "measure"], help="one part")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--sweep", type=int, nargs="*", default=[], help="further user steps for seed 0 at 30 %%")
    parser.add_argument("--echo", action="store_true", help="also learn one mask from random scores")
    parser.add_argument("--print", action="store_true", help="compute nothing new")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    run = Run(options)
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    others = [] if options.print else [
        subprocess.Popen([sys.executable, str(HERE), *given, "--jobs", "1"], env=alone, stdout=subprocess.DEVNULL)
        for _ in range(options.jobs - 1)
    ]  # fmt: skip
    try:
        if not options.print:
            run.all()
        print(choice.text_of(run.record()) if options.only == "choose" else run.show())
        best = Scheme(name="learned", weight=choice.weight_of(run.rules()["learned"], 0.3))
        if options.echo:
            print(echo(run.world, best, 0, 0.3))
        if options.sweep:
            found = arms(run.world, run.rules(), 0.3, 0, options.matched, "tensors")
            print(sweep(run.world, [found[0], found[2], found[-1]], 0, 0.3, options.sweep))
    except MmalignError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        for other in others:
            other.wait()
    return 0


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    sys.exit(main())
