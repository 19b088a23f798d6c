"""`mmalign arena`: from a source and a folder to a page that is being served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.arena.live import LiveSource
from mmalign.arena.offer import Offer, Work
from mmalign.arena.server import ArenaServer
from mmalign.arena.votes import VotesFile
from mmalign.arena.voting import Voting
from mmalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mmalign.experiment.opening import OpenRun

LIVE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaSettings:
    """What to show, where votes go, and who may come."""

    source: Path
    """A folder of pictures, a table of pairs or ranked lists, or a YAML file of `mmalign generate`."""
    out: Path
    """Folder of the votes; made, or gone on with."""
    host: str = "127.0.0.1"
    port: int = 0
    """0 picks a free one."""
    names: tuple[str, ...] = ()
    """Host names under which browsers may find the page, besides this machine's own."""
    prompt: str | None = None
    goal: int = 40
    seed: int = 0
    run: Path | None = None
    """A personalised run, for pictures after a few choices."""
    prompts: Path | None = None
    """Prompt file for these pictures."""
    overrides: tuple[str, ...] = ()
    """Settings of a YAML source to change."""


@contextmanager
def open_arena(settings: ArenaSettings) -> Iterator[ArenaServer]:
    """A server that listens, ready for `serve_forever`; votes are closed when the block ends.

    Raises:
        DataError: a source that cannot be shown, or votes that another arena writes.
        ConfigError: settings without meaning, or an address that cannot be taken.
    """
    from mmalign.arena.catalogue import open_source
    from mmalign.arena.plan import Plan

    if settings.goal < 1:
        raise ConfigError(f"--goal must be at least 1, got {settings.goal}")
    live = settings.source.suffix in LIVE_SUFFIXES
    if settings.overrides and not live:
        raise ConfigError(f"{' '.join(settings.overrides)}: settings go with a YAML source only")
    if settings.out.resolve() == settings.source.resolve():
        raise DataError(f"{settings.out}: votes need a folder of their own; give another --out")
    work = _personaliser(settings)
    with VotesFile(settings.out) as votes:
        model: LiveSource | None = None
        if live:
            from mmalign.generate import load_generation

            model = LiveSource(load_generation(settings.source, list(settings.overrides)), settings.out)
            model.start()
            catalogue = model.catalogue
        else:
            catalogue = open_source(settings.source, seed=settings.seed, prompt=settings.prompt)
        offer = Offer(votes=settings.out, run=settings.run, prompts=settings.prompts, work=work)
        voting = Voting(catalogue=catalogue, votes=votes, plan=Plan(catalogue, settings.seed), goal=settings.goal, offer=offer,
                        source=settings.source.name)  # fmt: skip
        try:
            server = ArenaServer(voting, (settings.host, settings.port), names=settings.names)
        except OSError as error:
            raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from error
        try:
            with server:
                yield server
        finally:
            if model is not None:
                model.stop()


def serve(settings: ArenaSettings, announce: Callable[[str], None]) -> None:
    """Serve until interrupted."""
    with open_arena(settings) as server:
        for line in greeting(server, settings):
            announce(line)
        server.serve_forever()


def greeting(server: ArenaServer, settings: ArenaSettings) -> Sequence[str]:
    """What is printed at the start."""
    voting = server.voting
    lines = list(voting.catalogue.notes)
    if voting.votes.recovered:
        lines.append(f"{voting.votes.recovered} bytes of an unconfirmed vote were moved to {settings.out / 'torn.jsonl'}")
    if len(voting.votes):
        lines.append(f"going on with {len(voting.votes)} votes in {voting.votes.path}")
    if not server.loopback:
        lines.append("this page can be reached from other machines, and anybody who reaches it can vote under any name")
    lines.append(f"votes go to {voting.votes.path}; end with Ctrl-C")
    lines.append(f"arena at {server.url}/")
    return lines


def _personaliser(settings: ArenaSettings) -> Work | None:
    """Makes pictures for a user with the run that was named; None where none was.

    Raises:
        ConfigError: a run without prompts for its pictures.
    """
    if settings.run is None:
        return None
    if settings.prompts is None:
        raise ConfigError("--run needs --prompts: a file with the prompts of the pictures that people get")
    if not settings.run.is_dir():
        raise ConfigError(f"{settings.run}: no such run")
    if not settings.prompts.is_file():
        raise ConfigError(f"{settings.prompts}: no such prompt file")
    run, prompts = settings.run, settings.prompts
    opened: list[OpenRun] = []

    def work(user: str) -> list[tuple[str, Path]]:
        from mmalign.arena.votes import VOTES
        from mmalign.data.files import canonical_hash
        from mmalign.experiment.opening import open_run
        from mmalign.personalize import personalize

        if not opened:  # one user at a time is worked for, so the first call loads the model for all
            opened.append(open_run(run))
        out = settings.out / "personal" / canonical_hash(user)[:16]
        number = 1 + sum(1 for _ in out.glob("*"))
        made = personalize(opened[0], settings.out / VOTES, prompts, user=user, out=out / f"{number:03d}")
        files = sorted((made.folder / "pictures").glob("*-personal.png"))
        return list(zip(made.prompts, files, strict=True))

    return work
