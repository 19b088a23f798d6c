"""Names, targets that are imported late, and messages that help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmalign.errors import ConfigError
from mmalign.registry import Registry, did_you_mean


@pytest.fixture
def colours() -> Registry[object]:
    registry: Registry[object] = Registry("colour")
    registry.add("scarlet", 1, summary="a red", cite="paper 1")
    registry.add("azure", "collections:OrderedDict")
    return registry


def test_an_object_and_an_imported_target(colours: Registry[object]) -> None:
    from collections import OrderedDict

    assert colours.get("scarlet") == 1
    assert colours.get("azure") is OrderedDict
    assert colours.get("collections:Counter").__name__ == "Counter"  # type: ignore[attr-defined]
    assert colours.names() == ["scarlet", "azure"]
    assert [(entry.name, entry.summary, entry.cite) for entry in colours] == [
        ("scarlet", "a red", "paper 1"),
        ("azure", "", ""),
    ]
    assert "scarlet" in colours and "any.module:Name" in colours and "scarlett" not in colours


def test_a_name_is_registered_once(colours: Registry[object]) -> None:
    with pytest.raises(ValueError, match="colour 'azure' is registered twice"):
        colours.add("azure", 2)
    assert colours.get("scarlet") == 1


def test_an_unknown_name_is_answered_with_the_nearest(colours: Registry[object]) -> None:
    with pytest.raises(ConfigError, match="colour 'scarlett' is not known; did you mean 'scarlet'"):
        colours.get("scarlett")
    with pytest.raises(ConfigError, match=r"colour 'xyz' is not known \(known: azure, scarlet\)"):
        colours.get("xyz")
    assert did_you_mean("x", []) == ""


def test_a_part_of_a_name_is_answered_with_the_names_that_hold_it() -> None:
    known = ["diffusion_dpo", "rank_dpo", "dspo", "mapo"]
    assert did_you_mean("dpo", known) == "; did you mean 'diffusion_dpo' or 'rank_dpo'?"  # 'dspo' is nearer by letters
    assert did_you_mean("Rank-DPO", known) == "; did you mean 'rank_dpo'?"
    assert did_you_mean("x", [f"a_{number}_x" for number in range(9)]).startswith(" (known: ")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_package.part:Name", "no module named 'no_such_package' .*no_such_package.part:Name"),
        ("collections.no_such_part:Name", "no module named 'collections.no_such_part'"),
        ("collections:NoSuchName", "module 'collections' has no 'NoSuchName'"),
    ],
)
def test_a_target_that_cannot_be_imported(colours: Registry[object], target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        colours.get(target)


def test_a_broken_import_inside_a_users_module_is_not_blamed_on_the_name(
    colours: Registry[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_unfinished_method.py").write_text("import a_library_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        colours.get("users_unfinished_method:Method")


def test_listing_methods_and_families_loads_no_model_library() -> None:
    code = (
        "import sys; from mmalign.trainers import METHODS; from mmalign.models.diffusion import FAMILIES;"
        "from mmalign.objectives import OBJECTIVES;"
        "print(METHODS.names(), FAMILIES.names(), OBJECTIVES.names());"
        "print([name for name in ('diffusers', 'transformers', 'peft', 'accelerate') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "diffusion_dpo" in out[0] and "sdxl" in out[0] and "'dpo'" in out[0]
    assert out[1] == "[]"
