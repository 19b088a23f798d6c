"""A folder scored by `mmalign score`, killed with SIGKILL three times and resumed, against the uninterrupted table.

    python benchmarks/rewards_resume.py                       # 2,000 pictures, the embedded reward
    python benchmarks/rewards_resume.py --images 200 --kills 2
    python benchmarks/rewards_resume.py --decode-workers 2       # the killed runs decode in processes, the other one not

Prints what happened and ends with 0 if both tables are equal row for row, to the last bit.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def make_folder(folder: Path, count: int) -> None:
    """Small pictures with prompts; every fiftieth file is cut, so that failures are compared too."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        file = folder / f"{index:05d}.png"
        Image.fromarray(rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(file)
        if index % 50 == 49:
            file.write_bytes(file.read_bytes()[:2000])
        lines.append(json.dumps({"file_name": file.name, "text": f"a red circle and {index % 7} blue squares"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(folder: Path, out: Path, decode_workers: int = 0) -> list[str]:
    """What a person types."""
    return [sys.executable, "-m", "mmalign", "score", str(folder), "--reward", "tiny-clip,brightness", "--out", str(out),
            "--device", "cpu", "--batch-size", "16", "--decode-workers", str(decode_workers)]  # fmt: skip


def finished(out: Path) -> int:
    """Parts whose manifest is written."""
    return len(list(out.with_name(f"{out.name}.parts").glob("*.json")))


def kill_once(folder: Path, out: Path, wait: float, decode_workers: int) -> tuple[int, int]:
    """Start, wait for new parts and `wait` seconds more, kill; parts before and after."""
    before = finished(out)
    process = subprocess.Popen(command(folder, out, decode_workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and finished(out) <= before:
        time.sleep(0.01)
    time.sleep(wait)
    if process.poll() is not None:
        raise SystemExit(f"the run ended with {process.returncode} before it could be killed; use more --images")
    process.send_signal(signal.SIGKILL)
    process.wait()
    return before, finished(out)


def differing_rows(one: pa.Table, two: pa.Table) -> int:
    """Rows that are not equal to the last bit; a missing score equals a missing score."""
    if not one.schema.equals(two.schema) or one.num_rows != two.num_rows:
        return max(one.num_rows, two.num_rows)
    return sum(str(a) != str(b) for a, b in zip(one.to_pylist(), two.to_pylist(), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--decode-workers", type=int, default=0, help="of the runs that are killed")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder, killed, whole = place / "pictures", place / "killed.parquet", place / "whole.parquet"
        make_folder(folder, options.images)
        for number in range(options.kills):
            before, after = kill_once(folder, killed, wait=0.05 * number, decode_workers=options.decode_workers)
            print(f"kill {number + 1}: {before} parts found, {after} finished when killed", flush=True)
        for out, workers in ((killed, options.decode_workers), (whole, 0)):
            code = subprocess.run(command(folder, out, workers), stdout=subprocess.DEVNULL, check=False).returncode
            print(f"{out.stem}: exit code {code} (3: some rows failed and are listed)", flush=True)
        one, two = pq.read_table(killed), pq.read_table(whole)
    wrong = differing_rows(one, two)
    failed = two["status"].to_pylist().count("failed")
    print(f"{two.num_rows} rows, {failed} of them failed, {wrong} differ from the uninterrupted run")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
