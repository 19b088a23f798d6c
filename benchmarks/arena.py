"""Votes of several real browsers at once, and a kill of the server in between: is every confirmed vote in the file?

    python benchmarks/arena.py                     # 5 headless Chromiums, 100 votes each, one SIGKILL after 200
    python benchmarks/arena.py --browsers 3 --votes 50

Every browser opens the page, gives a name and answers by keys (1, 2, 0, s in turn) as fast as the page confirms. The server
is killed once and started again on the same port and folder, while the pages go on asking. Needs Chromium, chromedriver and
selenium.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmalign.data import import_table, open_table
from tests.arena.arenas import Process, make_pictures, rows_of
from tests.arena.browsers import Page, chromium, missing

KEYS = {"1": "left", "2": "right", "0": "tie", "s": "skip"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browsers", type=int, default=5)
    parser.add_argument("--votes", type=int, default=100, help="of every browser")
    parser.add_argument("--kill-after", type=int, default=200, help="confirmed votes before the kill")
    asked = parser.parse_args()
    if missing():
        sys.exit(f"missing: {missing()}")
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if run(Path(folder), asked.browsers, asked.votes, asked.kill_after) else 1)


def run(folder: Path, browsers: int, votes: int, kill_after: int) -> bool:
    source, out = make_pictures(folder / "pictures", prompts=max(20, votes // 5), each=4), folder / "votes"
    arena = Process(source, out)
    confirmed: dict[str, tuple[str, str]] = {}
    lock, failures = threading.Lock(), []

    def browse(name: str) -> None:
        try:
            with chromium() as driver:
                page = Page(driver, arena.url)
                page.open(name)
                for number in range(votes):
                    key = list(KEYS)[number % len(KEYS)]
                    ticket = page.press(key)
                    with lock:
                        confirmed[ticket] = (name, KEYS[key])
        except Exception as error:  # a thread's last resort: told below
            failures.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")

    start = time.monotonic()
    threads = [threading.Thread(target=browse, args=(f"browser {number}",)) for number in range(browsers)]
    for thread in threads:
        thread.start()
    while len(confirmed) < kill_after and any(thread.is_alive() for thread in threads):
        time.sleep(0.005)
    with lock:
        before = dict(confirmed)
    arena.kill()
    at_kill = {row["id"] for row in rows_of(out)}
    again = Process(source, out, port=arena.port)
    for thread in threads:
        thread.join()
    again.kill()
    seconds = time.monotonic() - start
    rows = rows_of(out)
    in_file = {row["id"]: (row["user"], row["meta"]["choice"]) for row in rows}
    imported = import_table(out, folder / "table", progress=False)
    found = {
        "browsers": browsers, "votes_confirmed": len(confirmed), "rows": len(rows), "seconds": round(seconds, 1),
        "confirmed_before_the_kill": len(before), "lost_at_the_kill": len(set(before) - at_kill),
        "lost": len(set(confirmed) - set(in_file)), "changed": sum(in_file.get(k) != v for k, v in confirmed.items()),
        "never_confirmed": len(set(in_file) - set(confirmed)), "twice": len(rows) - len(in_file),
        "read_as_table": len(open_table(out)), "imported": imported.written, "failures": failures,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    whole = len(confirmed) == len(rows) == browsers * votes == found["read_as_table"] == found["imported"]
    return whole and not failures and not any(found[name] for name in ("lost_at_the_kill", "lost", "changed", "twice"))


if __name__ == "__main__":
    main()
