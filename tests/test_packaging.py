"""What is installed: every package, every data file, and no import of a library that is not declared."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open-clip-torch",
                "scenedetect": "scenedetect-headless"}  # fmt: skip


def setup() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg", encoding="utf-8")
    return found


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(text: str) -> dict[str, str]:
    """Canonical name -> the requirement, for a list of requirements; references to own extras left out."""
    found = (re.match(r"([\w.-]+)(.*)", line) for line in lines(text))
    return {canonical(match[1]): match[2] for match in found if match and match[1] != "mmalign"}


def test_every_package_is_installed() -> None:
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "mmalign").rglob("__init__.py")]
    packages = {".".join(folder.parts) for folder in folders}
    assert set(lines(setup()["options"]["packages"])) == packages | {"mmalign._assets", "mmalign._configs"}


def test_every_data_file_of_the_package_is_installed() -> None:
    data = {name: lines(globs) for name, globs in setup()["options.package_data"].items()}
    missing = []
    for path in (ROOT / "mmalign").rglob("*"):
        if not path.is_file() or path.suffix in (".py", ".pyc"):
            continue
        covered = any(
            path in (ROOT / package.replace(".", "/")).glob(pattern)
            for package, patterns in data.items()
            if not package.startswith("mmalign._")
            for pattern in patterns
        )
        missing += [] if covered else [str(path)]
    assert missing == []


def test_licences_of_others_are_installed() -> None:
    files = [name.strip() for name in setup()["metadata"]["license_files"].split(",")]
    assert files == ["LICENSE", "NOTICE"] and all((ROOT / name).is_file() for name in files)
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert "mmalign/rewards/clip_merges.txt.gz" in notice and "Copyright (c) 2021 OpenAI" in notice


def imported_distributions(folder: Path) -> dict[str, str]:
    """Distribution -> a file that imports from it."""
    found: dict[str, str] = {}
    # Scripts import the files beside them, and tests import scripts.
    neighbours = {path.stem for name in ("benchmarks", "scripts", "tests") for path in (ROOT / name).rglob("*.py")}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {name.partition(".")[0] for name in names} - {"mmalign", "tests", ""} - neighbours:
                if name not in sys.stdlib_module_names:
                    found[canonical(DISTRIBUTION.get(name, name))] = str(path.relative_to(ROOT))
    return found


def test_what_is_imported_is_declared() -> None:
    """Also where it happens to arrive with another library: that can change in any of its releases."""
    settings = setup()
    runtime = requirements(settings["options"]["install_requires"])
    optional = {name for text in settings["options.extras_require"].values() for name in requirements(text)}
    imported = imported_distributions(ROOT / "mmalign")
    assert {name: file for name, file in imported.items() if name not in runtime.keys() | optional} == {}
    tests = {**imported_distributions(ROOT / "tests"), **imported_distributions(ROOT / "scripts")}
    allowed = runtime.keys() | requirements(settings["options.extras_require"]["test"])
    assert {name: file for name, file in tests.items() if name not in allowed | optional} == {}


def test_every_requirement_has_a_lower_bound_that_the_tested_version_meets() -> None:
    settings = setup()
    pins = dict(line.split("==") for line in lines((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    tested = {canonical(name): version for name, version in pins.items()}
    blocks = [settings["options"]["install_requires"], settings["options.extras_require"]["test"]]
    for name, bound in (item for block in blocks for item in requirements(block).items()):
        assert bound.startswith(">="), name
        assert name in tested, f"{name} has no pin in constraints.txt"
        assert numbers(tested[name]) >= numbers(bound[2:]), name


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def test_console_script_is_the_command_line() -> None:
    assert lines(setup()["options.entry_points"]["console_scripts"]) == ["mmalign = mmalign.cli:main"]
    assert setup()["metadata"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_assets_and_configs_are_found_in_an_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wheel carries them inside the package, a checkout beside it."""
    from mmalign import assets

    monkeypatch.delenv("MMALIGN_ASSETS", raising=False)
    assert assets.folder() == ROOT / "assets"
    assert assets.shipped("configs") == ROOT / "configs"
    installed = tmp_path / "site-packages" / "mmalign"
    (installed / "_assets" / "tiny-sd").mkdir(parents=True)
    (installed / "_configs").mkdir()
    (tmp_path / "site-packages" / "assets").mkdir()  # somebody else's
    monkeypatch.setattr(assets, "__file__", str(installed / "assets.py"))
    assert assets.path("tiny-sd") == installed / "_assets" / "tiny-sd"
    assert assets.shipped("configs") == installed / "_configs"


def test_the_version_is_stated_once() -> None:
    import mmalign

    assert setup()["metadata"]["version"] == "attr: mmalign.__version__"
    try:
        installed = metadata.version("mmalign")
    except metadata.PackageNotFoundError:
        pytest.skip("mmalign is not installed in this environment, only on its path")
    assert installed == mmalign.__version__


def test_embedded_models_hold_no_path_of_the_machine_that_made_them() -> None:
    configurations = sorted((ROOT / "assets").rglob("*.json"))
    assert configurations
    assert [path.relative_to(ROOT) for path in configurations if "_name_or_path" in path.read_text(encoding="utf-8")] == []
