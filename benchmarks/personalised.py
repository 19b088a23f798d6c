"""One model for many simulated people of partly opposite tastes, against its base and against one model for all.

    python benchmarks/personalised.py --seeds 0 1 2                      # everything; prints the tables, writes the plots
    python benchmarks/personalised.py --seeds 1 --arms dpo               # one part; a later call goes on with the others
    python benchmarks/personalised.py --seeds 0 1 2 --table              # only what the finished parts say

24 people are trained on (60 choices each), 12 are never seen; everybody is then taken in from 4 fresh choices. Each arm leaves
``seed-S/<arm>.json`` in --out; a part that is there is not made again. What is compared: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from personalised_runs import ARMS, Size, run_arm
from personalised_table import plots, tables

FULL = Size()
SMALL = Size(steps=4, batch=4, prompts=2, trained=4, unseen=4, curve=(1, 4), inner=(0.5,), sampling=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=["dpo", "clip", "vlm"], choices=list(ARMS), metavar="ARM",
                        help=f"of {', '.join(ARMS)}; default: dpo clip vlm")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/personalised"))
    parser.add_argument("--plots", type=Path, default=None, help="folder for the SVG plots; default: --out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="make nothing")
    parser.add_argument("--small", action="store_true", help="sizes at which figures mean nothing, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not options.table:
        for seed in options.seeds:
            for arm in options.arms:
                print(f"seed {seed}, {arm}", flush=True)
                run_arm(options.out, seed, arm, SMALL if options.small else FULL)
    text = tables(options.out, options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    for path in plots(options.out, options.seeds, options.plots or options.out):
        print(path)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
