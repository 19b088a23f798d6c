"""Selectivity of learned freeze masks in the embedded world, against random masks and one-shot saliency of equal share.

    python benchmarks/freezing_selectivity.py --jobs 2          # chooses the weight on validation domains, measures, prints
    python benchmarks/freezing_selectivity.py --print           # prints what is there
    python benchmarks/freezing_selectivity.py --only choose --jobs 16          # a part; results are files below --out
    python benchmarks/freezing_selectivity.py --only measure --seeds 0                   # one seed

Two parts. `choose` sets how much an innocent user's cost counts, on persons and papers of the split `learn` alone
(benchmarks/freezing_choice.py has the rule). `measure` learns masks on the split `learn`, lets users fine-tune on other persons
and papers, and scores them there: per seed and ratio the learned mask; saliency masks with as many tensors, and with as many
parameters, frozen; and random masks with as many of both. Every finished arm is a file below --out, so that a killed run
continues where it stopped, and arms can be computed apart, on several machines.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import freezing_choice as choice
import numpy as np
from freezing_study import Scheme, World, held_out, validation
from freezing_tables import Arm, echo, sweep, tables

from mmalign.errors import MmalignError
from mmalign.freezing import FreezeMask

HERE = Path(__file__).resolve()


def schemes(record: dict[str, Any], ratio: float) -> dict[str, Scheme]:
    """Learned and saliency scores with the weights that were chosen, and saliency with the weight 1 of its definition."""
    learned, tuned = (
        Scheme(name=name, weight=round(choice.RULES[record[name]["chosen"]](ratio), 6)) for name in choice.SCHEMES
    )
    return {"learned": learned, "tuned": tuned, "saliency": Scheme(name="saliency", weight=1.0)}


def arms(world: World, record: dict[str, Any], ratio: float, seed: int, matched: int) -> list[Arm]:
    """Every mask of one cell, made when it is asked for."""
    of = schemes(record, ratio)

    def learned() -> FreezeMask:
        return world.scored(of["learned"], ratio=ratio, seed=seed)

    def tensors(name: str) -> Callable[[], FreezeMask]:
        return lambda: world.by_tensors(of[name], ratio=ratio, seed=seed)

    def share(name: str) -> Callable[[], FreezeMask]:
        return lambda: world.by_share(of[name], learned(), ratio=ratio, seed=seed)

    def chance(number: int) -> Callable[[], FreezeMask]:
        return lambda: world.by_chance(learned(), seed=100 * seed + number)

    found = [
        Arm("learned", f"learned-{ratio:g}", learned),
        Arm("saliency, as many tensors", f"saliency-tensors-{ratio:g}", tensors("saliency")),
        Arm("saliency, as many parameters", f"saliency-share-{ratio:g}", share("saliency")),
        Arm("saliency, weight chosen too, as many tensors", f"tuned-tensors-{ratio:g}", tensors("tuned")),
        Arm("saliency, weight chosen too, as many parameters", f"tuned-share-{ratio:g}", share("tuned")),
    ]
    return found + [Arm("random, as many of both", f"random-{number}-{ratio:g}", chance(number)) for number in range(matched)]


class Run:
    """The command's work."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)
        self.world = held_out(self.out, options.user_steps, options.shortened)

    def fold(self, number: int) -> World:
        """A validation world."""
        return validation(self.out, number, self.options.user_steps, self.options.shortened)

    def record(self) -> dict[str, Any]:
        """The choice, from the trials that are there.

        Raises:
            SystemExit: it is asked for before it was made.
        """
        missing = [trial for trial in choice.trials(self.options.ratios) if not self._has(trial)]
        if missing and self.options.only == "measure":
            raise SystemExit(f"the choice lacks {len(missing)} trials; run with --only choose first")
        return choice.choose(self.out, self.options.ratios, self.fold)

    def _has(self, trial: choice.Trial) -> bool:
        return self.fold(trial.fold).done(trial.name, trial.seed)

    # Jobs: a job is a name; whoever runs it computes one arm.

    def choosing(self) -> Iterator[str]:
        """First users without a mask, which the others need; then one job per trial."""
        every = list(choice.trials(self.options.ratios))
        yield from dict.fromkeys(f"plain:{trial.fold}:{trial.seed}" for trial in every)
        # Saliency scores serve every ratio: the first job of a weight makes them, the rest come later and find them.
        ordered = sorted(range(len(every)), key=lambda place: (every[place].scheme.name == "saliency", place))
        yield from (f"trial:{place}" for place in ordered if not self._has(every[place]))

    def measuring(self) -> Iterator[str]:
        """Learned masks before those that are matched with them."""
        yield from (f"plain:held-out:{seed}" for seed in self.options.seeds)
        record = self.record()
        for first in (True, False):
            for seed in self.options.seeds:
                for ratio in self.options.ratios:
                    found = arms(self.world, record, ratio, seed, self.options.matched)
                    for number, arm in enumerate(found):
                        if (number == 0) == first and not self.world.done(arm.name, seed):
                            yield f"arm:{seed}:{ratio:g}:{number}"

    def do(self, job: str) -> None:
        """Compute one job."""
        kind, *rest = job.split(":")
        if kind == "plain":
            (self.world if rest[0] == "held-out" else self.fold(int(rest[0]))).plain(int(rest[1]))
        elif kind == "trial":
            trial = list(choice.trials(self.options.ratios))[int(rest[0])]
            trial.selectivity(self.fold(trial.fold))
        else:
            seed, ratio, number = int(rest[0]), float(rest[1]), int(rest[2])
            arm = arms(self.world, self.record(), ratio, seed, self.options.matched)[number]
            self.world.losses(arm.name, arm.mask, seed)

    def spread(self, jobs: Sequence[str], arguments: Sequence[str]) -> None:
        """Jobs one after the other, or each in a process of its own on one thread.

        Raises:
            SystemExit: one of them failed; the others were finished.
        """
        if self.options.jobs == 1:
            for job in jobs:
                self.do(job)
            return
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

        def start(job: str) -> int:
            return subprocess.run([sys.executable, str(HERE), *arguments, "--job", job], env=alone, check=False).returncode

        with ThreadPoolExecutor(self.options.jobs) as pool:
            failed = [job for job, code in zip(jobs, pool.map(start, jobs), strict=True) if code]
        if failed:
            raise SystemExit(f"{len(failed)} of {len(jobs)} jobs failed, the first is {failed[0]}")

    def all(self, arguments: Sequence[str]) -> None:
        """Both parts, or the one that is asked for."""
        parts = (("choose", self.choosing), ("measure", self.measuring))
        for name, listed in parts:
            if self.options.only in (None, name):
                # Saliency scores and plain users are needed by several jobs: stages keep two from making the same ones.
                for stage in stages(list(listed())):
                    self.spread(stage, arguments)

    def show(self) -> str:
        """The tables of everything that is finished."""
        record = self.record()
        cells = {
            (ratio, seed): arms(self.world, record, ratio, seed, self.options.matched)
            for ratio in self.options.ratios for seed in self.options.seeds
        }  # fmt: skip
        whole = {key: found for key, found in cells.items() if all(self.world.done(arm.name, key[1]) for arm in found)}
        return choice.text_of(record) + "\n\n" + tables(self.world, whole, self.options.ratios)


def stages(jobs: list[str]) -> list[list[str]]:
    """Users without a mask first; then the arms that others are matched with; then the rest."""
    plain = [job for job in jobs if job.startswith("plain:")]
    first = [job for job in jobs if job.startswith("arm:") and job.endswith(":0")]
    rest = [job for job in jobs if job not in plain and job not in first]
    return [stage for stage in (plain, first, rest) if stage]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/freezing-selectivity")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--matched", type=int, default=2, help="random masks per seed and ratio")
    parser.add_argument("--user-steps", type=int, default=30)
    parser.add_argument("--shortened", type=int, default=1, help="divide mask learning by this, to try the path")
    parser.add_argument("--only", choices=["choose", "measure"], help="one part")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--job", help="compute this one job and print nothing else")
    parser.add_argument("--sweep", type=int, nargs="*", default=[], help="further user steps for seed 0 at 30 %%")
    parser.add_argument("--echo", action="store_true", help="also learn one mask from random scores")
    parser.add_argument("--print", action="store_true", help="compute nothing new")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    run = Run(options)
    try:
        if options.job is not None:
            run.do(options.job)
            return 0
        if not options.print:
            run.all(given)
        if options.only == "choose":
            print(choice.text_of(run.record()))
            return 0
        print(run.show())
        if options.echo:
            print(echo(run.world, schemes(run.record(), 0.3)["learned"], 0, 0.3))
        if options.sweep:
            found = arms(run.world, run.record(), 0.3, 0, options.matched)
            print(sweep(run.world, [found[0], found[2], found[-1]], 0, 0.3, options.sweep))
    except MmalignError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    sys.exit(main())
