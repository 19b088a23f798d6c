"""The house rules that a reader of one file cannot see: who may import whom, and what is loaded only when it is needed.

Read from the syntax tree of every module, imports inside functions and under TYPE_CHECKING included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mmalign"

LAYERS = {
    "errors": 0, "registry": 0, "types": 0, "rng": 0, "assets": 0,
    "branches": 1, "config": 1, "objectives": 1, "diffusion": 1, "media": 1, "statistics": 1, "serving": 1,
    "data": 2, "models": 2, "rewards": 2, "world": 2, "freezing": 2,
    "trainers": 3, "selection": 3,
    "engine": 4,
    "experiment": 5, "evaluation": 5, "evaluate_guard": 5, "compare": 5, "report": 5, "export": 5, "demo": 5, "generate": 5,
    "annotate": 5, "scoring": 5, "arena": 5, "sampling": 5,
    "demo_vlm": 5, "demo_cxr": 5, "demo_temple": 5, "demo_people": 5, "videobench": 5, "personalize": 5, "cli": 5, "__main__": 5,
}  # fmt: skip
"""Part of the package -> layer. A part imports from lower layers and itself; only the top layer imports sideways."""

ONLY = {("engine", "trainers"): {"mmalign.trainers.base"}}
"""Where one part may use no more of another than this."""
ENGINE_MAY_USE = {"config", "diffusion", "objectives", "media", "statistics", "trainers"}
"""The loop knows no model, reward or sampler: nothing of layer 2."""

HEAVY = {
    "accelerate", "av", "bert_score", "cv2", "bitsandbytes", "datasets", "diffusers", "matplotlib", "open_clip", "peft",
    "pydicom", "ray", "rouge_score", "sacrebleu", "scenedetect", "tensorboard", "torchvision", "transformers", "wandb",
    "xformers",
}  # fmt: skip
"""Libraries that take long to import, or may be missing: imported inside the functions that need them."""
WHOLE_PURPOSE: dict[str, set[str]] = {}
"""Module -> heavy libraries that it may import at its top, because the module is about nothing else."""
WITHOUT_TORCH = {"serving", "errors", "registry", "assets", "config", "media", "statistics", "cli", "__main__", ""}
"""Parts that must not import torch when they are imported ('' is the package itself)."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


@dataclass(frozen=True)
class Import:
    """One imported module: who, where, what, and whether it happens on import of the importing module."""

    importer: str
    line: int
    imported: str
    at_import_time: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part of the package a module belongs to; '' for the package itself and for other packages."""
    names = module.split(".")
    return names[1] if names[0] == "mmalign" and len(names) > 1 else ""


def is_type_checking(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST, at_import_time: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, with whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child):
            runs = [(statement, False) for statement in child.body] + [(item, at_import_time) for item in child.orelse]
            for statement, runs_now in runs:
                yield statement, runs_now
                yield from walk(statement, runs_now)
            continue
        inside = at_import_time and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, inside
        yield from walk(child, inside)


def imports_of(path: Path) -> list[Import]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node, runs in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [Import(name, node.lineno, alias.name, runs) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, source]).rstrip(".")
            if source == "mmalign":  # from mmalign import rng: each name is a part
                found += [Import(name, node.lineno, f"mmalign.{alias.name}", runs) for alias in node.names]
            else:
                found.append(Import(name, node.lineno, source, runs))
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [found for path in FILES for found in imports_of(path)]
OWN = [found for found in IMPORTS if found.imported.split(".")[0] == "mmalign"]


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {part_of(module_name(path)) for path in FILES} - {""}
    assert parts - set(LAYERS) == set(), "give it a layer here and in docs/architecture.md"


def test_imports_go_down() -> None:
    wrong = []
    for found in OWN:
        importer, imported = part_of(found.importer), part_of(found.imported)
        if imported.startswith("__") or importer == imported or "" in (importer, imported):
            continue
        lower = LAYERS[imported] < LAYERS[importer]
        top = LAYERS[importer] == LAYERS[imported] == 5
        if not (lower or top or imported == "errors"):  # anything may raise the package's errors
            wrong.append(f"{found} (layer {LAYERS[importer]} imports layer {LAYERS[imported]})")
    assert wrong == []


def test_the_engine_knows_no_model_reward_or_table() -> None:
    wrong = []
    for found in OWN:
        importer, imported = part_of(found.importer), part_of(found.imported)
        if importer == "engine" and LAYERS.get(imported, 0) > 0 and imported not in {*ENGINE_MAY_USE, "engine"}:
            wrong.append(str(found))
        if (importer, imported) in ONLY and found.imported not in ONLY[importer, imported]:
            wrong.append(str(found))
    assert wrong == []


def test_heavy_libraries_are_imported_where_they_are_needed() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if found.at_import_time
        and found.imported.split(".")[0] in HEAVY - WHOLE_PURPOSE.get(found.importer, set())
    ]
    assert wrong == []


def test_torch_stays_out_of_what_must_answer_at_once() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if found.imported.split(".")[0] == "torch"
        and part_of(found.importer) in WITHOUT_TORCH
        and (found.at_import_time or part_of(found.importer) == "config")
    ]
    assert wrong == []


def test_only_scripts_and_the_command_line_start_things() -> None:
    """No module of the package imports the command line, so that every function can be used without it."""
    wrong = [
        str(found)
        for found in OWN
        if part_of(found.imported) == "cli" and part_of(found.importer) not in ("cli", "__main__")
    ]
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    long = [
        f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_nothing_is_unpickled() -> None:
    """Weights and states come from safetensors and plain data: a file somebody sent must not be able to run code."""
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                safe = "weights_only=True" in ast.unparse(node)
                if called in ("pickle.load", "pickle.loads") or (called == "torch.load" and not safe):
                    wrong.append(f"{module_name(path)}:{node.lineno} calls {called}")
    assert wrong == []


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    """The checks above rest on this function; here is a file of which everything is known."""
    path = PACKAGE / "made_up.py"
    source = (
        "import os\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft\nelse:\n    import yaml\n"
        "try:\n    import torch\nexcept ImportError:\n    pass\nclass A:\n    import numpy\n"
        "def f():\n    from diffusers import X\n    from mmalign import rng, types\n"
        "from .errors import E\nfrom . import registry\n"
    )
    place = tmp_path / "mmalign" / "made_up.py"
    place.parent.mkdir()
    place.write_text(source)
    found = _imports_as(place, path)
    assert {(item.imported, item.at_import_time) for item in found} == {
        ("os", True), ("typing", True), ("peft", False), ("yaml", True), ("torch", True), ("numpy", True),
        ("diffusers", False), ("mmalign.rng", False), ("mmalign.types", False), ("mmalign.errors", True),
        ("mmalign.registry", True),
    }  # fmt: skip


def _imports_as(place: Path, pretended: Path) -> list[Import]:
    """`imports_of` for text that lies elsewhere, read as if it were the module `pretended`."""

    class Pretended(type(pretended)):  # type: ignore[misc]
        def read_text(self, *arguments: object, **options: object) -> str:
            return place.read_text()

    return imports_of(Pretended(pretended))
