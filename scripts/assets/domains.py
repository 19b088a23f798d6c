"""Draw the embedded table of domains: portraits (illegal) and shapes on patterned paper (innocent), a few seconds.

The split ``learn`` holds one group of persons and patterns, ``adapt`` and ``test`` another.
"""

from __future__ import annotations

import time

import pyarrow as pa
import pyarrow.parquet as pq
from common import ASSETS, write_card

from mmalign.world.domains import domain_rows

SEED = 71
FOLDER = ASSETS / "tiny-domains"
SPLITS = {"learn": (0, 256), "adapt": (1, 256), "test": (1, 128)}
"""Split -> group of persons and patterns, and pictures of each domain."""


def main() -> None:
    begin = time.process_time()
    rows = []
    for place, (split, (group, number)) in enumerate(SPLITS.items()):
        rows += domain_rows(split, group=group, number=number, seed=SEED, stream=10 * place)
    FOLDER.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([*((name, pa.string()) for name in ("id", "prompt", "role", "domain", "split")), ("image", image)])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), FOLDER / "part-00000.parquet", compression="zstd")
    write_card(
        FOLDER / "card.json", recipe="scripts/assets/domains.py", seed=SEED, seconds=time.process_time() - begin,
        metrics={"pictures": len(rows)},
        notes="Drawn, not sampled. 'learn' shares no person and no pattern with 'adapt' and 'test'.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
