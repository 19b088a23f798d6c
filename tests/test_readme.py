"""Every command and link in README.md and docs: options exist, files exist, settings decode. Nothing is run here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from mmalign.cli import app
from mmalign.cli.script import _parser
from mmalign.experiment import load_experiment

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
STARTS = ("mmalign ", "make ", "accelerate launch ", "python scripts/", "pip install ")
PLACEHOLDER = re.compile(r"^[A-Z][A-Z_|]*$|\.\.\.|…|[\[<]")


@dataclass(frozen=True)
class Command:
    """A command line as a page shows it."""

    page: str
    line: int
    text: str
    complete: bool
    """In a fenced block, to be typed as it stands; in running text arguments may be left out."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def commands_of(path: Path) -> Iterator[Command]:
    """Lines of fenced blocks and inline code that start like one of our commands; continued lines joined."""
    page, lines = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8").splitlines()
    fenced, pending, begun = False, "", 0
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if not fenced:
            for text in re.findall(r"`([^`]+)`", line):
                if text.startswith(STARTS):
                    yield Command(page, number, text, complete=False)
            continue
        text = line.strip().removeprefix("$ ")
        if pending:
            text = f"{pending} {text}"
        elif not text.startswith(STARTS):
            continue
        else:
            begun = number
        if text.endswith("\\"):
            pending = text[:-1].strip()
            continue
        pending = ""
        yield Command(page, begun, text, complete=True)


COMMANDS = [command for path in PAGES for command in commands_of(path)]


def test_there_are_commands_to_check() -> None:
    kinds = {start for start in STARTS for command in COMMANDS if command.text.startswith(start)}
    assert {"mmalign ", "make ", "accelerate launch "} <= kinds


LAUNCHED = " -m mmalign "


@cache
def command_tree() -> Any:
    """What the command line offers; made once, because it is read for every command of every page."""
    return typer.main.get_command(app)


@pytest.mark.parametrize(
    "command", [item for item in COMMANDS if item.text.startswith("mmalign ") or LAUNCHED in item.text], ids=str
)
def test_mmalign_commands_parse(command: Command) -> None:
    found = command_tree()
    words, path = command.words[command.words.index("mmalign") + 1 :], "mmalign"
    while hasattr(found, "commands"):
        name = next((word for word in words if not word.startswith("-")), None)
        if name is None or PLACEHOLDER.search(name):
            return  # "mmalign --help", or a page that speaks of commands in general
        assert name in found.commands, f"{path} has no command '{name}'"
        words = words[words.index(name) + 1 :]
        found, path = found.commands[name], f"{path} {name}"
    if not command.complete:
        options = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options | {"--help"}
        return
    words = [word for word in words if not re.search(r"^\[|\.\.\.|…|\]$", word) or ("=" in word and "…" not in word)]
    try:
        found.make_context(path, words)
    except (typer.Exit, SystemExit) as end:  # --help
        assert "--help" in command.words, end
    if path.split()[-1] in ("train", "check", "explain"):
        check_experiment(words)


def check_experiment(words: list[str]) -> None:
    """An experiment file that is shipped decodes with the overrides behind it."""
    file = next((word for word in words if word.endswith(".yaml")), None)
    if file is not None and file.startswith("configs/"):
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        load_experiment(ROOT / file, overrides)


@pytest.mark.parametrize("command", [item for item in COMMANDS if item.text.startswith("make ")], ids=str)
def test_make_targets_exist(command: Command) -> None:
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    targets = [word for word in command.words[1:] if "=" not in word and not PLACEHOLDER.search(word)]
    variables = [word.partition("=")[0] for word in command.words[1:] if "=" in word]
    assert set(targets) <= rules
    assert set(variables) <= {"PYTHON", "BASE_PYTHON", "TEST_WORKERS"}


@pytest.mark.parametrize(
    "command",
    [
        item
        for item in COMMANDS
        if item.text.startswith(("accelerate launch ", "python scripts/")) and LAUNCHED not in item.text
    ],
    ids=str,
)
def test_script_commands_parse(command: Command) -> None:
    words = command.words
    at = next(index for index, word in enumerate(words) if word.startswith("scripts/"))
    if PLACEHOLDER.search(words[at]) or re.search("[A-Z]", words[at]):
        return
    assert (ROOT / words[at]).is_file()
    if words[at].startswith("scripts/assets/"):
        return  # a recipe of an embedded model, not a method
    if "--config_file" in words[:at]:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    method = Path(words[at]).stem.removeprefix("train_")
    options = _parser(method).parse_intermixed_args(words[at + 1 :])
    if options.config.startswith("configs/"):
        assert load_experiment(ROOT / options.config, options.overrides).config.method_name == method


@pytest.mark.parametrize("command", [item for item in COMMANDS if item.text.startswith("pip install ")], ids=str)
def test_extras_exist(command: Command) -> None:
    import configparser

    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    for extras in re.findall(r"(?:mmalign|\.)\[([\w,]+)\]", command.text):
        assert set(extras.split(",")) <= set(settings["options.extras_require"])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    missing = [
        target
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_in_running_text_exist(path: Path) -> None:
    """A path in code marks that starts with a folder of this project is a file of this project."""
    folders = "mmalign|configs|scripts|tests|assets|benchmarks"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_site_shows_every_page_of_docs() -> None:
    import yaml

    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]) == pages
