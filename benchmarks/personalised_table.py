"""What the results of ``personalised.py`` say: tables in Markdown and plots as SVG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from personalised_runs import ARMS, MIXES, MODES

from mmalign.report import words
from mmalign.report.svg import ticks
from mmalign.statistics import Interval, mean_interval
from mmalign.world.people import Person, liking, people

Results = dict[int, dict[str, dict[str, Any]]]
NAMES = {
    "clip": "CLIP differences", "vlm": "tiny VLM, differences", "profile": "tiny VLM, one prompt", "table": "free table",
    "prototypes": "prototypes",
}  # fmt: skip


def read(out: Path, seeds: Sequence[int]) -> Results:
    """seed -> arm -> pictures -> measures, for what is there and has at least everybody's own pictures."""
    found: Results = {}
    for seed in seeds:
        paths = {arm: out / f"seed-{seed}" / f"{arm}.json" for arm in ARMS}
        there = {arm: json.loads(path.read_text()) for arm, path in paths.items() if path.is_file()}
        found[seed] = {arm: told["pictures"] for arm, told in there.items() if told["complete"] or everybody(told["pictures"])}
    return found


def everybody(pictures: dict[str, Any]) -> bool:
    """Whether an unfinished result has pictures for all people of the full size."""
    return {person.name for person in people()} <= set(pictures)


def persons_of(pictures: dict[str, Any]) -> list[Person]:
    """The people of a result."""
    names = [name for name in pictures if " " not in name]
    count = [sum(name.startswith(kind) for name in names) for kind in ("person-", "newcomer-")]
    return list(people(*count))


def scores(person: Person, measured: dict[str, Any]) -> np.ndarray:
    """How a person likes a set of pictures. [P]"""
    return liking(person, np.array(measured["properties"]))


def beats(first: np.ndarray, second: np.ndarray) -> float:
    """Share of pictures that are liked better; ties count one half."""
    return float(np.mean((first > second) + 0.5 * (first == second)))


def over_people(values: Sequence[float]) -> Interval:
    """Mean with an interval over people (and seeds): they are what is resampled."""
    return mean_interval(values, seed=0)


def told(found: Interval) -> str:
    """A share with its interval."""
    return f"{found.mean:.1%} ({found.low:.1%} to {found.high:.1%})"


def rates(result: dict[str, dict[str, Any]], arm: str, trained: bool) -> dict[str, list[float]]:
    """Per person: own pictures over the base's, over one model's for all, those made for others over the base's."""
    pictures = result[arm]
    everybody = persons_of(pictures)
    group = [person for person in everybody if person.trained is trained]
    found: dict[str, list[float]] = {
        "base": [],
        "dpo": [],
        "others": [],
        "own over others": [],
        "opposite": [],
        "oracle": [],
    }
    for person in group:
        own, base = scores(person, pictures[person.name]), scores(person, pictures["base"])
        found["base"].append(beats(own, base))
        if "dpo" in result:
            found["dpo"].append(beats(own, scores(person, result["dpo"]["dpo"])))
        others = [scores(person, pictures[one.name]) for one in group if one is not person]
        found["others"].append(float(np.mean([beats(other, base) for other in others])))
        found["own over others"].append(float(np.mean([beats(own, other) for other in others])))
        facing = min(group, key=lambda one: abs((one.angle - person.angle) % 360 - 180))
        found["opposite"].append(beats(scores(person, pictures[facing.name]), base))
        found["oracle"].append(float(np.mean(pictures[person.name]["oracle"]) - np.mean(pictures["base"]["oracle"])))
    return found


def pooled(results: Results, arm: str, trained: bool) -> dict[str, list[float]]:
    """The same over all seeds."""
    total: dict[str, list[float]] = {}
    for result in results.values():
        if arm in result:
            for name, values in rates(result, arm, trained).items():
                total.setdefault(name, []).extend(values)
    return total


def tables(out: Path, seeds: Sequence[int]) -> str:
    """All tables as Markdown."""
    results = read(out, seeds)
    arms = [arm for arm in ARMS if arm != "dpo" and any(arm in result for result in results.values())]
    lines = [
        "| embedding | people | over the base | over Diffusion-DPO | another's pictures over the base | the opposite's | own "
        "over another's | oracle, own minus base |", "|---" * 8 + "|",
    ]  # fmt: skip
    for arm in arms:
        for trained in (True, False):
            found = pooled(results, arm, trained)
            cells = [
                told(over_people(found[name])) if found[name] else ""
                for name in ("base", "dpo", "others", "opposite", "own over others")
            ]
            oracle = over_people(found["oracle"])
            who = "trained" if trained else "never seen"
            lines.append(
                f"| {NAMES[arm]} | {who} | "
                + " | ".join(cells)
                + f" | {oracle.mean:+.3f} ({oracle.low:+.3f} to {oracle.high:+.3f}) |"
            )
    return "\n".join(
        [
            *lines,
            "",
            *by_seed(results, arms),
            "",
            *by_person(results),
            "",
            *curve_table(results, arms),
            "",
            *mix_table(results),
        ]
    )


def by_seed(results: Results, arms: Sequence[str]) -> list[str]:
    """Win rates of every seed alone."""
    lines = [
        "| seed | embedding | trained, over base | trained, over DPO | never seen, over base | never seen, over DPO |",
        "|---" * 6 + "|",
    ]
    for seed, result in results.items():
        for arm in arms:
            if arm in result:
                cells = [told(over_people(values)) if (values := rates(result, arm, trained)[name]) else ""
                         for trained in (True, False) for name in ("base", "dpo")]  # fmt: skip
                lines.append(f"| {seed} | {NAMES[arm]} | " + " | ".join(cells) + " |")
    return lines


def by_person(results: Results, arm: str = "clip") -> list[str]:
    """Everybody's rates over prompts and seeds, with an interval over prompts."""
    there = {seed: result for seed, result in results.items() if arm in result and "dpo" in result}
    if not there:
        return []
    everybody = persons_of(next(iter(there.values()))[arm])
    lines = ["| person | likes | over the base | over Diffusion-DPO |", "|---|---|---|---|"]
    above = 0
    for person in everybody:
        cells = []
        for other in ("base", "dpo"):
            wins: list[float] = []
            for result in there.values():
                own = scores(person, result[arm][person.name])
                against = scores(person, result[arm]["base"] if other == "base" else result["dpo"]["dpo"])
                wins += ((own > against) + 0.5 * (own == against)).astype(float).tolist()
            found = mean_interval(wins, seed=0)
            above += found.low > 0.5
            cells.append(told(found))
        lines.append(f"| {person.name} | {person.words} ({person.angle:g} deg) | " + " | ".join(cells) + " |")
    return [*lines, "", f"{above} of {2 * len(everybody)} intervals lie above one half."]


def curve(results: Results, arm: str) -> dict[int, Interval]:
    """Newcomers' win rates over the base by the number of pairs."""
    total: dict[int, list[float]] = {}
    for result in results.values():
        pictures = result.get(arm)
        if pictures is None:
            continue
        everybody = [one for one in persons_of(pictures) if not one.trained]
        # The same people at every number of pairs.
        for person in (one for one in everybody if any(name.startswith(f"{one.name} x") for name in pictures)):
            base = scores(person, pictures["base"])
            for name, measured in pictures.items():
                own, _, shots = name.partition(" x")
                if own == person.name:
                    total.setdefault(int(shots or 4), []).append(beats(scores(person, measured), base))
    return {shots: over_people(values) for shots, values in sorted(total.items())}


def curve_table(results: Results, arms: Sequence[str]) -> list[str]:
    """Win rates of newcomers by the number of their choices."""
    found = {arm: curve(results, arm) for arm in arms}
    shots = sorted({one for values in found.values() for one in values})
    lines = ["| pairs of a newcomer | " + " | ".join(map(str, shots)) + " |", "|---" * (len(shots) + 1) + "|"]
    return lines + [
        f"| {NAMES[arm]} | " + " | ".join(told(values[one]) if one in values else "" for one in shots) + " |"
        for arm, values in found.items()
    ]


def mixes(results: Results, label: str, mode: str, arm: str = "clip") -> dict[float, tuple[Interval, Interval]]:
    """Share of B -> liking of A and of B, in deviations, over prompts and seeds."""
    first, second = next((a, b) for name, a, b in MIXES if name == label)
    total: dict[float, tuple[list[float], list[float]]] = {}
    for result in results.values():
        pictures = result.get(arm)
        if pictures is None:
            continue
        trained = [person for person in persons_of(pictures) if person.trained]
        a, b = trained[first % len(trained)], trained[second % len(trained)]
        ends = {0.0: a.name, 1.0: b.name}
        inner = {float(name.split()[-1]): name for name in pictures if name.startswith(f"{label} {mode} ")}
        for share, name in {**ends, **inner}.items():
            both = total.setdefault(share, ([], []))
            for values, person in zip(both, (a, b), strict=True):
                values.extend((scores(person, pictures[name]) - scores(person, pictures["base"])).tolist())
    return {share: (mean_interval(one), mean_interval(two)) for share, (one, two) in sorted(total.items())}


def mix_table(results: Results) -> list[str]:
    """Liking of A and B along the way from A to B."""
    lines: list[str] = []
    for label, *_ in MIXES:
        for mode in MODES:
            found = mixes(results, label, mode)
            if found and not lines:
                lines = [
                    "| from A to B | mode | liked by | " + " | ".join(f"{share:g}" for share in found) + " |",
                    "|---" * (len(found) + 3) + "|",
                ]
            for index, who in enumerate(("A", "B")):
                cells = [f"{both[index].mean:+.2f}" for both in found.values()]
                if cells:
                    lines.append(f"| {label} | {mode} | {who} | " + " | ".join(cells) + " |")
    return lines


def plots(out: Path, seeds: Sequence[int], folder: Path) -> list[Path]:
    """``personalised-pairs.svg`` and ``personalised-mix.svg``."""
    results = read(out, seeds)
    folder.mkdir(parents=True, exist_ok=True)
    lines = {NAMES[arm]: {float(x): y for x, y in curve(results, arm).items()} for arm in NAMES}
    made = []
    if any(lines.values()):
        made.append(folder / "personalised-pairs.svg")
        text = chart({name: values for name, values in lines.items() if values}, "pairs of a person never seen (log scale)",
                     "own picture over the base's", percent=True, log=True)  # fmt: skip
        made[-1].write_text(text, encoding="utf-8")
    opposite = mixes(results, "opposite", "prediction")
    if opposite:
        made.append(folder / "personalised-mix.svg")
        lines = {f"liked by {who}": {x: both[index] for x, both in opposite.items()} for index, who in enumerate("AB")}
        text = chart(lines, "share of B in the mixture of A and B", "liking minus the base's, deviations")
        made[-1].write_text(text, encoding="utf-8")
    return made


TONES = ("#2563a8", "#c2571a", "#3a7d44", "#7a4fa3", "#8a6d1d")


def chart(
    lines: dict[str, dict[float, Interval]], across: str, up: str, *, percent: bool = False, log: bool = False
) -> str:
    """Lines with intervals, as a drawing of its own."""
    width, height, left, right, top, bottom = 560, 300, 62, 16, 34, 44
    xs = sorted({x for values in lines.values() for x in values})
    places = {x: (np.log2(x) if log else x) for x in xs}
    low = min([0.0 if not percent else 0.4, *(one.low for values in lines.values() for one in values.values())])
    high = max([1.0 if percent else 0.0, *(one.high for values in lines.values() for one in values.values())])
    first, last = min(places.values()), max(places.values())

    def px(x: float) -> float:
        return left + (places[x] - first) / ((last - first) or 1) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - low) / ((high - low) or 1) * (height - top - bottom)

    style = "text{font:12px sans-serif;fill:#555}.r{stroke:#ccc}.g{stroke:#888;stroke-dasharray:4 3}"
    head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    parts = [f'<svg {head} aria-label="{escape(up)} over {escape(across)}"><style>{style}</style>']
    parts.append(f'<rect width="{width}" height="{height}" fill="#fff"/>')
    for value in ticks(low, high, 5):
        label = f"{100 * value:g}%" if percent else f"{'+' if value > 0 else ''}{words.axis(value)}"
        parts.append(f'<line class="r" x1="{left}" x2="{width - right}" y1="{py(value):.1f}" y2="{py(value):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{py(value) + 4:.1f}" text-anchor="end">{label}</text>')
    guide = 0.5 if percent else 0.0
    parts.append(f'<line class="g" x1="{left}" x2="{width - right}" y1="{py(guide):.1f}" y2="{py(guide):.1f}"/>')
    parts += [f'<text x="{px(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>' for x in xs]
    parts.append(f'<text x="{(left + width) / 2:.0f}" y="{height - 6}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text x="8" y="14">{escape(up)}</text>')
    for index, (name, values) in enumerate(lines.items()):
        tone = TONES[index % len(TONES)]
        path = "".join(
            f"{'L' if number else 'M'}{px(x):.1f} {py(one.mean):.1f}" for number, (x, one) in enumerate(values.items())
        )
        parts.append(f'<path d="{path}" fill="none" stroke="{tone}" stroke-width="2"/>')
        for x, one in values.items():
            parts.append(f'<path d="M{px(x):.1f} {py(one.low):.1f}V{py(one.high):.1f}" stroke="{tone}"/>'
                         f'<circle cx="{px(x):.1f}" cy="{py(one.mean):.1f}" r="3.5" fill="{tone}"/>')  # fmt: skip
        parts.append(
            f'<text x="{width - right}" y="{14 + 14 * index}" text-anchor="end" style="fill:{tone}">{escape(name)}</text>'
        )
    return "".join([*parts, "</svg>\n"])
