"""Pickled third-party checkpoints: tensors come out, code does not run."""

from __future__ import annotations

import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmalign.errors import ModelError
from mmalign.rewards import convert
from mmalign.rewards.convert import convert_checkpoint


def test_a_pickled_module_of_a_foreign_class(tmp_path: Path) -> None:
    foreign = types.ModuleType("foreign_trainer")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.low = nn.Parameter(torch.randn(4, 4).half().T)

    Model.__module__, Model.__qualname__ = "foreign_trainer", "Model"
    foreign.Model = Model  # type: ignore[attr-defined]
    sys.modules["foreign_trainer"] = foreign
    model = Model()
    torch.save(model, tmp_path / "m.pth")
    del sys.modules["foreign_trainer"]
    names = convert_checkpoint(tmp_path / "m.pth", tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert names == sorted(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype


def archive(file: Path, payload: bytes, blocks: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("x/data.pkl", payload)
        for name, data in (blocks or {}).items():
            out.writestr(f"x/data/{name}", data)
    return file


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    source = archive(tmp_path / "evil.pt", pickle.dumps({"a": Evil(tmp_path / "ran")}))
    with pytest.raises(ModelError, match="no tensors"):
        convert_checkpoint(source, tmp_path / "out.safetensors")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.safetensors").exists()


def test_a_forged_tensor_cannot_read_beyond_its_block(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(4.0)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        inner = next(name for name in good.namelist() if name.endswith("data.pkl"))
        payload = good.read(inner)
    # The storage shrinks below what the tensor's size claims.
    source = archive(tmp_path / "short.pt", payload, {"0": b"\0" * 8})
    with pytest.raises(ModelError, match="outside its storage"):
        convert_checkpoint(source, tmp_path / "out.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip"])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ModelError):
        convert_checkpoint(tmp_path / "x.pt", tmp_path / "out.safetensors")


class Busy(nn.Module):
    """A layer used under two names, weights tied to another's, and a table that it last computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(4, 3)
        self.second = nn.Linear(3, 4, bias=False)
        self.second.weight = self.first.weight
        self.again = self.first
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("passing", torch.arange(5.0), persistent=False)
        self.settings = types.SimpleNamespace()


@pytest.mark.parametrize("is_archive", [True, False])
def test_what_comes_out_is_the_state_of_the_module_in_both_file_formats(tmp_path: Path, is_archive: bool) -> None:
    model = Busy()
    torch.save({"model": model, "half": model.first.weight.detach().half().T}, tmp_path / "m.pth",
               _use_new_zipfile_serialization=is_archive)  # fmt: skip
    convert_checkpoint(tmp_path / "m.pth", tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    expected = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert set(found) == {*expected, "half"} and torch.equal(found["half"], model.first.weight.half().T)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_object_without_attributes_and_a_tensor_with_some(tmp_path: Path) -> None:
    marked = nn.Parameter(torch.ones(2))
    marked.note = "x"  # type: ignore[attr-defined]
    torch.save({"empty": types.SimpleNamespace.__new__(types.SimpleNamespace), "w": marked}, tmp_path / "m.pt")
    assert convert_checkpoint(tmp_path / "m.pt", tmp_path / "m.safetensors") == ["w"]
    source = archive(tmp_path / "bare.pt", b"\x80\x02cposix\nsystem\n(U\x04truet\x81.")
    with pytest.raises(ModelError, match="no tensors"):
        convert_checkpoint(source, tmp_path / "out.safetensors")


def rebuilt(size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of one float32 tensor over the storage "0"."""
    parts = [b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x06tQK\x00"]
    parts += [pickle.dumps(numbers, 2)[2:-1] for numbers in (size, stride)]
    return b"".join([*parts, b"\x89}tR."])


def nested(times: int) -> bytes:
    """A list in a list ..., each holding the one before it twice."""
    steps = b"".join(b"]q%c(h%ch%ce0" % (index, index - 1, index - 1) for index in range(1, times))
    return b"\x80\x02]q\x00K\x01a0" + steps + b"h%c." % (times - 1)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (nested(60), "refers to itself"),
        (b"\x80\x02]q\x00(h\x00h\x00e.", "refers to itself"),
        (rebuilt((10**12,), (0,)), "times the bytes of the file"),
        (rebuilt((10**30,), (0,)), "cannot be read"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "no tensors"),
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.", "cannot be read"),
        (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.", "not converted"),
    ],
)
def test_few_bytes_that_describe_very_much(
    tmp_path: Path, payload: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "MAX_NODES", 20_000)
    source = archive(tmp_path / "x.pt", payload, {"0": b"\0" * 24})
    with pytest.raises(ModelError, match=words):
        convert_checkpoint(source, tmp_path / "out.safetensors")


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("x/data.pkl", rebuilt((2, 3), (3, 1)))
        out.writestr("x/data/0", b"\0" * 24)
    with pytest.raises(ModelError, match="compressed"):
        convert_checkpoint(tmp_path / "x.pt", tmp_path / "out.safetensors")


def test_an_old_file_cut_short(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(100.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "old.pt").read_bytes()
    for length in (40, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(ModelError):
            convert_checkpoint(tmp_path / "cut.pt", tmp_path / "out.safetensors")
