"""Pictures straight from a model: candidates of `mmalign generate`, made in the background while people already choose.

A picture is a function of the settings, so what an earlier run made is found again (by a hash of the settings) and used.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.arena.catalogue import Catalogue, Group, Picture
from mmalign.data.files import atomic_file, canonical_hash
from mmalign.errors import ConfigError, MmalignError
from mmalign.media import read_bytes
from mmalign.types import ImageRef

if TYPE_CHECKING:
    from mmalign.generate import GenerateConfig


class LiveSource:
    """Fills a catalogue prompt by prompt.

    Raises:
        ConfigError: the settings make a single picture a prompt.
    """

    def __init__(self, config: GenerateConfig, folder: Path) -> None:
        from mmalign.experiment.prompts import read_prompts

        if sum(source.candidates for source in config.sources) < 2:
            raise ConfigError("the arena needs two pictures a prompt: set 'candidates' to 2, or name a second source")
        self.config = config
        self.prompts = [prompt for prompt, _ in read_prompts(config.prompts, config.max_prompts)]
        job = {**config.model_dump(mode="json", exclude={"out", "device", "max_prompts", "prompts_per_part"})}
        self.folder = folder / "live" / canonical_hash({**job, "prompts": self.prompts})[:16]
        self.catalogue = Catalogue()
        self.catalogue.expected = len(self.prompts)
        self.problem: str | None = None
        """Why it stopped, if it did."""
        self._families: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self, *, wait_for_first: bool = True) -> None:
        """Begin; the first prompt is made here, so that a model that cannot be loaded is an error before anybody votes."""
        if wait_for_first and self.prompts:
            self.catalogue.add(self.group(0))
        self._thread.start()

    def stop(self) -> None:
        """End after the prompt under way."""
        self._stop.set()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        try:
            for row in range(len(self.catalogue), len(self.prompts)):
                if self._stop.is_set():
                    return
                self.catalogue.add(self.group(row))
        except MmalignError as error:
            self.problem = str(error)
        except Exception as error:  # a thread's last resort: those who wait must hear of it
            self.problem = f"{type(error).__name__}: {error}"
        if self.problem is not None:
            self.catalogue.notes.append(f"the model stopped: {self.problem}")
            self.catalogue.expected = len(self.catalogue)

    def group(self, row: int) -> Group:
        """The pictures of one prompt, made or read."""
        from mmalign.generate import prompt_id

        key = prompt_id(row, self.prompts[row])
        pictures: list[Picture] = []
        for source in self.config.sources:
            files = [self.folder / f"{key}-{_safe(source.label)}-{number}.png" for number in range(source.candidates)]
            if not all(file.is_file() for file in files):
                self._make(row, source, files)
            for number, file in enumerate(files):
                origin = json.dumps({"model": source.label, "candidate": number, "seed": self._seed(source, number, key),
                                     "steps": source.steps, "guidance": source.guidance}, ensure_ascii=False)  # fmt: skip
                name = f"l{canonical_hash([self.folder.name, file.name])[:24]}"
                pictures.append(Picture(name, origin, _opener(file)))
        return Group(key, self.prompts[row], tuple(pictures))

    def _make(self, row: int, source: Any, files: Sequence[Path]) -> None:
        from mmalign.generate import load_source, sample_candidates

        family = self._families.get(source.label)
        if family is None:
            family = self._families[source.label] = load_source(source, self.config.device)
        made = sample_candidates(family, source, self.config.seed, self.prompts, range(row, row + 1), lambda count: None)
        for file, data in zip(files, made[0]["pictures"], strict=True):
            with atomic_file(file) as handle:
                handle.write(data)

    def _seed(self, source: Any, number: int, key: str) -> int:
        from mmalign.generate import candidate_seed

        return candidate_seed(self.config.seed, source.label, number, key)


def _safe(label: str) -> str:
    """A model's label as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in label)[:40] + canonical_hash(label)[:6]


def _opener(file: Path) -> Any:
    return lambda: read_bytes(ImageRef(path=str(file), label=file.name))[0]
