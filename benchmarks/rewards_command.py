"""`mmalign score` as a part of the GPU benchmark: a checkpoint and a table on disk, a finished table out."""

from __future__ import annotations

import json
import shutil
import time
from typing import TYPE_CHECKING

from mmalign import assets
from mmalign.scoring import run
from mmalign.scoring.job import Job
from mmalign.scoring.sources import Columns

if TYPE_CHECKING:
    from rewards_gpu import Bench


def command(bench: Bench, encoder: float) -> None:
    """What `mmalign score` does with the folder: the same weights from a checkpoint, parts, resume and table included; the time
    after loading."""
    weights, table = bench.place / "weights", bench.place / "pictures.jsonl"
    bench.models.hf.to(bench.models.backend.dtype).save_pretrained(weights)
    for file in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(assets.path("tiny-clip") / file, weights / file)
    rows = [{"image": file.name, "prompt": f"a red circle left of a blue square number {index}"}
            for index, file in enumerate(bench.files)]  # fmt: skip
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for processes in (bench.decoders.processes, 0):
        if bench.left < 0:
            print(f"mmalign score, {processes} decoding processes: left out, the time is up", flush=True)
            break
        job = Job(input=str(table), rewards=("clipscore",), out=str(bench.place / f"scores-{processes}.parquet"),
                  paths={"clipscore": str(weights)}, device=str(bench.device), batch_size=bench.options.batch,
                  columns=Columns(prompt="prompt"), decode_workers=processes)  # fmt: skip
        marks = [(time.perf_counter(), 0)]
        report = run.score(job, progress=lambda done, total, marks=marks: marks.append((time.perf_counter(), done)))
        if report is None or report.failed:
            raise SystemExit(f"rows failed: {report}")
        # The first part waits for the rewards to be loaded, and for processes to start; of a single part that is all there is.
        (first, head), (last, done) = marks[min(1, len(marks) - 2)], marks[-1]
        rate = (done - head) / (last - first)
        bench.say(
            f"mmalign score, {processes} decoding processes",
            f"{rate:.0f} pictures/s from the first part on ({100 * rate / encoder:.0f} % of the encoders' pairs/s)",
            rate=rate, of_encoders=rate / encoder,
        )  # fmt: skip
