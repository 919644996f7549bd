"""`gaq_nequip.deploy.artefact` on a small module that is no NequIP model: the same format, compiled in seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import torch
from torch.export.pt2_archive._package import load_pt2

from gaq_nequip.deploy import artefact
from gaq_nequip.deploy.artefact import ArtefactError

METADATA = {"r_max": "5.0", "type_names": "H C", "num_types": "2", "gaq_preset": "gaq", "gaq_config": '{"a": [1, "µ"]}'}
MODEL = "data/aotinductor/model"
CUSTOM_OPS = "nequip_custom_ops_libs.txt"
CALLS: dict[str, Callable[[Path], Any]] = {
    "slim": lambda path: artefact.slim(path, path),
    "sections": artefact.sections,
    "metadata": artefact.metadata,
}


class Small(torch.nn.Module):
    """Float weights and integer codes, as a quantized model has them."""

    codes: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(32, 64, generator=generator, dtype=torch.float32))
        self.register_buffer("codes", torch.randint(-127, 128, (64, 8), generator=generator, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight) @ (self.codes.to(x.dtype) * 0.01)


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, inputs: torch.Tensor) -> Path:
    """The compiled module; not to be changed."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs a C++ compiler: AOTInductor compiles with it")
    path = tmp_path_factory.mktemp("compiled") / "small.nequip.pt2"
    module = Small().requires_grad_(False)
    program = torch.export.export(module, (inputs,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": METADATA}
    )
    return path


@pytest.fixture
def compiled(original: Path, tmp_path: Path) -> Path:
    """A copy of the compiled module, alone in its folder."""
    return Path(shutil.copy(original, tmp_path))


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    # `aoti_load_package` would accept archives of another format with a mere warning.
    return load_pt2(str(path)).aoti_runners["model"](x)


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Change the entries of an archive, or leave them out."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            changed = change(name, data)
            if changed is not None:
                archive.writestr(name, changed)


def names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


needs_strip = pytest.mark.skipif(shutil.which("strip") is None, reason="needs the program strip")


@needs_strip
@pytest.mark.smoke
def test_slim_computes_the_same_in_less_space(compiled: Path, inputs: torch.Tensor) -> None:
    target = compiled.with_name("slim.nequip.pt2")
    assert artefact.slim(compiled, target) is True
    assert torch.equal(run(target, inputs), run(compiled, inputs))
    assert target.stat().st_size < 0.5 * compiled.stat().st_size
    assert artefact.metadata(target) == artefact.metadata(compiled)
    assert {path.name for path in compiled.parent.iterdir()} == {compiled.name, target.name}


@needs_strip
def test_slim_in_place_and_twice(compiled: Path, inputs: torch.Tensor) -> None:
    before = run(compiled, inputs)
    compiled.chmod(0o640)
    assert artefact.slim(compiled, compiled)
    once = compiled.read_bytes()
    assert compiled.stat().st_mode & 0o777 == 0o640
    assert artefact.slim(compiled, compiled)
    assert compiled.read_bytes() == once
    assert torch.equal(run(compiled, inputs), before)
    assert list(compiled.parent.iterdir()) == [compiled]


def test_slim_file_may_be_renamed(compiled: Path, inputs: torch.Tensor, tmp_path: Path) -> None:
    expected = run(compiled, inputs)
    artefact.slim(compiled, compiled)
    moved = tmp_path / "elsewhere" / "other name.pt2"
    moved.parent.mkdir()
    compiled.rename(moved)
    assert torch.equal(run(moved, inputs), expected)
    assert torch.allclose(expected, Small()(inputs))
    assert artefact.metadata(moved)["gaq_preset"] == "gaq"


def test_slim_keeps_what_it_does_not_know(compiled: Path, inputs: torch.Tensor) -> None:
    expected = run(compiled, inputs)
    root = names(compiled)[0].partition("/")[0]
    extra = {CUSTOM_OPS: b"math json", f"{root}/{MODEL}/kernel.cubin": b"\x7fELF", f"{root}/{MODEL}/x.json": b"{}"}
    with zipfile.ZipFile(compiled, "a") as archive:
        for name, data in extra.items():
            archive.writestr(name, data)
        archive.writestr(f"{root}/{MODEL}/kernel.h", "// generated")
    artefact.slim(compiled, compiled)
    with zipfile.ZipFile(compiled) as archive:
        assert {name: archive.read(name) for name in extra} == extra
        assert not any(name.endswith(".h") for name in archive.namelist())
        assert sum(entry.file_size for entry in archive.infolist() if entry.filename.endswith(".cpp")) == 0
        assert all(name.startswith(f"{root}/") for name in archive.namelist()[:2])
    # As NequIP does; `load_pt2` alone refuses the list of libraries, which lies outside of the root.
    assert torch.equal(torch._inductor.aoti_load_package(str(compiled))(inputs), expected)


def _no_strip(folder: Path) -> None:
    pass


def _failing_strip(folder: Path) -> None:
    (folder / "strip").write_text("#!/bin/sh\nexit 1\n")
    (folder / "strip").chmod(0o755)


def _harmful_strip(folder: Path) -> None:
    (folder / "strip").write_text('#!/bin/sh\n: > "$2"\n')
    (folder / "strip").chmod(0o755)


@pytest.mark.parametrize("program", [_no_strip, _failing_strip, _harmful_strip])
def test_slim_without_a_useful_strip(
    program: Callable[[Path], None],
    compiled: Path,
    inputs: torch.Tensor,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = artefact.sections(compiled)
    folder = tmp_path_factory.mktemp("bin")
    program(folder)
    expected = run(compiled, inputs)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(folder))
        assert artefact.slim(compiled, compiled) is False
    after = artefact.sections(compiled)
    assert (after.weights, after.code, after.sources) == (before.weights, before.code, 0)
    assert after.total < before.total
    assert torch.equal(run(compiled, inputs), expected)


def test_sections_add_up(compiled: Path) -> None:
    sizes = artefact.sections(compiled)
    with zipfile.ZipFile(compiled) as archive:
        entries = {entry.filename: entry.file_size for entry in archive.infolist()}
    sources = sum(size for name, size in entries.items() if name.endswith((".cpp", ".h")))
    # Each constant, and their section, begins at a multiple of 64 bytes.
    assert 4 * 32 * 64 + 64 * 8 <= sizes.weights <= 4 * 32 * 64 + 64 * 8 + 3 * 64
    assert sizes.total == compiled.stat().st_size
    assert sizes.sources == sources > 0
    assert sizes.weights + sizes.code + sizes.sources + sizes.other == sum(entries.values())
    artefact.slim(compiled, compiled)
    slim = artefact.sections(compiled)
    assert (slim.weights, slim.sources) == (sizes.weights, 0)
    assert slim.code <= sizes.code
    assert slim.total == compiled.stat().st_size


def test_weights_outside_of_the_library(compiled: Path) -> None:
    """Weights after the end of the library, where torch puts more than 2 GB of them, and in a blob."""
    before = artefact.sections(compiled)
    rewrite(compiled, lambda name, data: data + bytes(1000) if name.endswith(".so") else data)
    root = names(compiled)[0].partition("/")[0]
    with zipfile.ZipFile(compiled, "a") as archive:
        archive.writestr(f"{root}/{MODEL}/small.wrapper_weights.blob", bytes(500))
        archive.writestr(f"{root}/data/weights/weight_0", bytes(20))
    assert artefact.sections(compiled).weights == before.weights + 1520
    assert artefact.sections(compiled).code == before.code
    assert artefact.slim(compiled, compiled) is False
    after = artefact.sections(compiled)
    assert (after.weights, after.code) == (before.weights + 1520, before.code)


def test_library_of_another_system(compiled: Path) -> None:
    library = b"\xcf\xfa\xed\xfe" + bytes(range(256))
    rewrite(compiled, lambda name, data: library if name.endswith(".so") else data)
    sizes = artefact.sections(compiled)
    assert (sizes.weights, sizes.code) == (0, len(library))
    assert artefact.slim(compiled, compiled) is False
    assert artefact.sections(compiled).code == len(library)


def test_metadata_is_what_the_loader_reads(compiled: Path) -> None:
    facts = artefact.metadata(compiled)
    assert facts == load_pt2(str(compiled)).aoti_runners["model"].get_metadata()
    assert METADATA.items() <= facts.items()
    assert facts["AOTI_DEVICE_KEY"] == "cpu"


@pytest.mark.parametrize(("content", "message"), [(None, "no metadata"), (b"{", "cannot"), (b"[]", "not a mapping")])
def test_metadata_that_cannot_be_read(content: bytes | None, message: str, compiled: Path) -> None:
    rewrite(compiled, lambda name, data: content if name.endswith("_metadata.json") else data)
    with pytest.raises(ArtefactError, match=f"small.nequip.pt2: .*{message}"):
        artefact.metadata(compiled)


@pytest.mark.parametrize("call", CALLS)
def test_no_compiled_model(call: str, tmp_path: Path) -> None:
    package = tmp_path / "package.pt2"
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("package/model/eager/model.pkl", b"")
        archive.writestr("package/model.so", b"")
    (tmp_path / "text.pt2").write_text("r_max: 5.0\n")
    (tmp_path / "empty.pt2").touch()
    (tmp_path / "folder.pt2").mkdir()
    with zipfile.ZipFile(tmp_path / "nothing.pt2", "w"):
        pass
    before = sorted(tmp_path.iterdir())
    for name, message in {
        "absent.pt2": "no such file",
        "folder.pt2": "a folder",
        "empty.pt2": "an empty file",
        "text.pt2": "not a compiled model, which is a zip archive",
        "nothing.pt2": "without a compiled library",
        "package.pt2": "without a compiled library.*compile the model with nequip-deploy build",
    }.items():
        with pytest.raises(ArtefactError, match=f"{name}: .*{message}"):
            CALLS[call](tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("call", ["slim", "sections"])
def test_damaged_file(call: str, compiled: Path) -> None:
    complete = compiled.read_bytes()
    size = len(complete)
    library = complete.index(b"\x7fELF")
    damaged = [complete[:length] for length in (5, 100, size // 10, size // 2, size - 100, size - 10, size - 1)]
    damaged.append(complete[:library] + bytes(64) + complete[library + 64 :])
    for data in damaged:
        compiled.write_bytes(data)
        with pytest.raises(ArtefactError, match=r"small.nequip.pt2: truncated or damaged .*; copy or compile it again"):
            CALLS[call](compiled)
        assert compiled.read_bytes() == data
        assert list(compiled.parent.iterdir()) == [compiled]


def test_cut_library_in_a_complete_archive(compiled: Path) -> None:
    rewrite(compiled, lambda name, data: data[: len(data) // 2] if name.endswith(".so") else data)
    for call in ("slim", "sections"):
        with pytest.raises(ArtefactError, match="truncated or damaged"):
            CALLS[call](compiled)


def test_failure_leaves_nothing_behind(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiled.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", full)
        with pytest.raises(OSError, match="No space left"):
            artefact.slim(compiled, compiled)
    assert compiled.read_bytes() == before
    assert list(compiled.parent.iterdir()) == [compiled]


def test_no_folder_for_the_target(compiled: Path) -> None:
    with pytest.raises(ArtefactError, match=r"the folder .*absent does not exist"):
        artefact.slim(compiled, compiled.parent / "absent" / "out.pt2")


def test_reading_needs_no_nequip(compiled: Path) -> None:
    """The command that prints the metadata of a file should not take seconds."""
    code = (
        "import sys, types; package = types.ModuleType('gaq_nequip'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['gaq_nequip'] = package\n"
        "from gaq_nequip.deploy import artefact; print(artefact.metadata(sys.argv[2])['gaq_preset'])\n"
        "assert not {'torch', 'nequip'} & set(sys.modules)"
    )
    folder = Path(artefact.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, folder, compiled], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "gaq\n"), done.stderr


@pytest.mark.slow
@needs_strip
def test_compiled_nequip_model(
    train: Callable[..., Any], command: Callable[..., Any], structures: list[Any], tmp_path: Path
) -> None:
    """A model of the stock commands gives the same energies and forces to the last bit in the stock calculator."""
    import numpy as np
    from nequip.integrations.ase import NequIPCalculator

    def with_cells(config: Any) -> None:
        # Without cells there are no stresses, and NequIP's own check of what it compiled fails.
        cells = {"_target_": "nequip.data.transforms.NonPeriodicCellTransform", "override_cell": True}
        config["data"]["transforms"].insert(0, cells)
        config["run"], config["trainer"]["max_epochs"] = ["train"], 1

    trained = train(tmp_path / "training", with_cells)
    assert trained.code == 0, trained.text
    path = tmp_path / "model.nequip.pt2"
    options = ("--mode", "aotinductor", "--target", "ase", "--device", "cpu")
    done = command("nequip-compile", trained.best, path, *options, cwd=trained.folder, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    slim = tmp_path / "elsewhere" / "renamed.nequip.pt2"
    slim.parent.mkdir()
    assert artefact.slim(path, slim)

    def results(file: Path) -> list[Any]:
        calculator = NequIPCalculator.from_compiled_model(
            str(file), device="cpu", chemical_species_to_atom_type_map=True
        )
        values = []
        for atoms in structures:
            copy = atoms.copy()
            copy.calc = calculator
            values += [copy.get_potential_energy(), copy.get_forces()]
        return values

    expected, got = results(path), results(slim)
    assert all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))
    assert max(np.abs(forces).max() for forces in expected[1::2]) > 0
    facts = artefact.metadata(slim)
    assert facts == artefact.metadata(path)
    assert facts["type_names"].split() == ["H", "C", "O"]
    assert facts["AOTI_DEVICE_KEY"] == "cpu"
    before, after = artefact.sections(path), artefact.sections(slim)
    assert after.weights == before.weights > 0
    assert after.total < 0.25 * before.total
