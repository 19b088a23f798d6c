"""How much the chosen precision changes scores: a few rows scored in it and in float32, before the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmalign import rng
from mmalign.errors import DataError
from mmalign.scoring.job import Worker

COSINE_BOUND = 4e-3
"""Largest difference of a cosine between half precision and float32 that is accepted."""
CLEAR_GAP = 5e-3
"""Two scores whose cosines differ by more in float32 must keep their order."""
CLEAR_SHARE = 0.05
"""The same for rewards that are no multiple of a cosine, as a share of the scores' spread."""
ORDER_BOUND = 0.99
MOST_ROWS = 2048


def check_precision(worker: Worker, rows: int) -> dict[str, Any]:
    """Score `rows` random rows in float32 too.

    Returns:
        per reward: ``max_difference``, ``order_agreement`` of clearly different rows, ``bound``, ``rows``.

    Raises:
        DataError: a reward moves by more than its bound, or more than 1 % of clear orders turn.
    """
    from mmalign import rewards

    job = worker.job
    count = min(rows, worker.count, MOST_ROWS)
    order = rng.numpy_stream(0, "scoring precision").permutation(worker.count)[:count]
    chosen = [row for index in sorted(order.tolist()) for row in worker.source.rows(index, index + 1)]
    cells = [(row.images[column], row.prompt, row.user) for row in chosen for column in worker.source.columns]
    usable = [(image, prompt or "", user) for image, prompt, user in cells if not isinstance(image, str) and prompt is not None]
    usable = usable or [(image, "", user) for image, _, user in cells if not isinstance(image, str)]
    if not usable:
        raise DataError(f"precision check: none of {count} rows can be scored")
    images, prompts, users = [item[0] for item in usable], [item[1] for item in usable], [item[2] for item in usable]
    exact_set = rewards.load(job.versioned(), dict(job.paths), job.device, "fp32", workers=job.workers,
                             local_files_only=job.local_files_only, colours=job.colours, decode=job.decode,
                             fast_preprocess=job.fast_preprocess)  # fmt: skip
    given = _values(worker.scorers(), images, prompts, users, job.batch_size)
    exact = _values(exact_set, images, prompts, users, job.batch_size)
    out = {}
    for name, backend, one, other in zip(job.rewards, exact_set.backends, given, exact, strict=True):
        out[name] = _compare(one, other, backend.cosine_unit)
    failed = {name: item for name, item in out.items() if not item["passed"]}
    if failed:
        words = "; ".join(
            f"{name}: largest difference {item['max_difference']:.3g} (bound {item['bound']}), "
            f"order kept in {100 * item['order_agreement']:.1f} % of clear pairs"
            for name, item in failed.items()
        )
        raise DataError(f"precision check on {len(usable)} pictures failed: {words}. Use --dtype fp32")
    return out


def _values(
    scorers: Any, images: Sequence[Any], prompts: Sequence[str], users: Sequence[str | None], batch: int | None
) -> list[np.ndarray]:
    found = scorers.engine.run(images, prompts, batch_size=batch, on_error="nan", users=users)
    return [np.asarray(found[backend.name].values, dtype=np.float64) for backend in scorers.backends]


def _compare(given: np.ndarray, exact: np.ndarray, unit: float) -> dict[str, Any]:
    kept = np.isfinite(given) & np.isfinite(exact)
    lost = int((np.isfinite(given) != np.isfinite(exact)).sum())
    given, exact = given[kept], exact[kept]
    if not len(given):
        return {
            "rows": 0,
            "max_difference": 0.0,
            "order_agreement": 1.0,
            "bound": None,
            "lost": lost,
            "passed": not lost,
        }
    gap = CLEAR_GAP * unit if unit else CLEAR_SHARE * float(exact.max() - exact.min())
    differences = exact[:, None] - exact[None]
    clear = differences > gap
    same = (given[:, None] > given[None])[clear]
    agreement = float(same.mean()) if clear.any() else 1.0
    largest = float(np.abs(given - exact).max())
    bound = COSINE_BOUND * unit if unit else None
    passed = agreement >= ORDER_BOUND and not lost and (bound is None or largest <= bound)
    return {"rows": len(given), "max_difference": largest, "order_agreement": agreement, "bound": bound, "lost": lost,
            "passed": passed}  # fmt: skip
