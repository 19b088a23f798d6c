"""An arena over real pictures, as a process of its own or in this one, and a voter who talks to it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmalign.arena.running import ArenaSettings, open_arena
from mmalign.arena.server import ArenaServer

ROOT = Path(__file__).resolve().parents[2]


def make_pictures(folder: Path, prompts: int = 6, each: int = 4, side: int = 24) -> Path:
    """Pictures of noise, `each` of every prompt, with a metadata file."""
    folder.mkdir(parents=True)
    draw, rows = np.random.default_rng(0), []
    for prompt in range(prompts):
        for number in range(each):
            name = f"{prompt}-{number}.png"
            Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name)
            rows.append({"file_name": name, "prompt": f"prompt {prompt}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@contextmanager
def served(source: Path, out: Path, **settings: Any) -> Iterator[ArenaServer]:
    """An arena in a thread of this process."""
    with open_arena(ArenaSettings(source=source, out=out, **settings)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Process:
    """`mmalign arena` as its own process, to be killed."""

    def __init__(self, source: Path, out: Path, port: int = 0) -> None:
        words = [sys.executable, "-m", "mmalign", "arena", str(source), "--out", str(out), "--port", str(port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("arena at "):
                self.url = line.removeprefix("arena at ").strip()
                self.port = int(self.url.rsplit(":", 1)[1].strip("/"))
                return
        raise AssertionError(f"the arena did not start: {self.lines}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Voter:
    """Speaks to the arena as its page does."""

    def __init__(self, port: int, name: str) -> None:
        self.port, self.name = port, name

    def ask(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def next(self, holding: list[str] | None = None) -> dict[str, Any]:
        code, said = self.ask("/api/next", {"user": self.name, "holding": holding or []})
        assert code == 200, said
        return said

    def vote(self, choice: str, pair: dict[str, Any] | None = None, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        pair = pair or self.next()["pair"]
        body = {"user": self.name, "ticket": pair["ticket"], "key": pair["key"], "choice": choice, **more}
        code, said = self.ask("/api/vote", body)
        assert code == 200, said
        return pair, said

    def insist(self, path: str, body: Any, seconds: float = 60) -> dict[str, Any]:
        """As the page: again and again until there is an answer."""
        end = time.monotonic() + seconds
        while True:
            try:
                code, said = self.ask(path, body)
                if code == 200:
                    return said
                assert code >= 500, said
            except (OSError, http.client.HTTPException, ValueError):
                pass
            assert time.monotonic() < end, "no answer"
            time.sleep(0.05)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
