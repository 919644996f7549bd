"""The command `nequip-deploy`: from a quantized checkpoint to a file that runs without this package."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import numpy as np
import torch
from nobody import as_nobody

import gaq
from gaq import cli
from gaq.adapter import adapter_for_file
from gaq.config.parse import parse_config
from gaq.deployed.check import compare, default_tolerance
from gaq.kernels.cpu import native
from gaq.model.state import state_of
from gaq.reporting import open_file
from gaq.reporting.gates import verdict
from gaq_nequip.deploy import artefact
from gaq_nequip.deploy import cli as deploy_cli
from gaq_nequip.deploy import compile as deploy_compile
from gaq_nequip.deploy import sizes as deploy_sizes
from gaq_nequip.deploy.cli import main


@pytest.mark.smoke
def test_package(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.nequip.zip"
    assert main(["build", str(trained.best), str(path)]) == 0
    out = capsys.readouterr().out
    for word in ("weights, float32", "codes and scales", "folded by type", "largest force difference", "written:"):
        assert word in out
    assert [p.name for p in tmp_path.iterdir()] == ["out.nequip.zip"]
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "preset w8a16, frozen" in out
    assert "gaq_folded                   1" in out
    assert "rounded, folded by type" in out
    # Checkpoint and package say that they were trained, and a report needs no flag for it.
    assert open_file(trained.best).training == open_file(path).training == "qat"


def messages(error: str) -> list[str]:
    """Lines on stderr, without those about what takes over two seconds, as on a slow machine."""
    return [line for line in error.splitlines() if not line.startswith(("loading ", "packaging", "comparing "))]


@pytest.mark.slow
@pytest.mark.smoke
def test_streams_of_the_command(trained: Any, command: Callable[..., Any], tmp_path: Path) -> None:
    """In a process of its own: results on stdout, and nothing on stderr."""
    path = tmp_path / "out.nequip.zip"
    done = command("nequip-deploy", "build", trained.best, path)
    assert (done.returncode, messages(done.stderr)) == (0, [])
    assert "written:" in done.stdout
    done = command("nequip-deploy", "info", path)
    assert (done.returncode, messages(done.stderr)) == (0, [])
    assert "preset w8a16, frozen" in done.stdout


@pytest.mark.slow
def test_a_user_without_a_home(trained: Any, tmp_path: Path) -> None:
    for name in ("out.nequip.zip", "out.nequip.pt2"):
        done = as_nobody(tmp_path, "gaq_nequip.deploy.cli:main", "build", trained.best, tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "gaq: this user has no home" in done.stderr
        assert "Traceback" not in done.stderr


def test_train_dir(trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.nequip.zip"
    assert main(["build", "--train-dir", str(trained.best.parent), str(path)]) == 0
    assert path.is_file()


def test_a_gate_that_fails_writes_nothing(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.nequip.zip"
    assert main(["build", str(trained.best), str(path), "--tolerance", "1e-9"]) == 1
    assert "not written, because forces differ from the model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_input(trained: Any, trained_float: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: Any, word: str) -> None:
        assert main(["build", *map(str, arguments)]) == 2
        assert word in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    out = tmp_path / "out.nequip.pt2"
    refused(trained_float.best, out, word="a float model. Quantize it first (gaq quantize best.ckpt")
    refused(tmp_path / "missing.ckpt", out, word="no such file")
    refused(trained.best, tmp_path / "out.pth", word="has to end in .nequip.pt2 or .nequip.zip")
    refused(trained.best, tmp_path / "no" / "out.nequip.pt2", word="does not exist")
    refused(trained.best, out, "--target", "lammps", word="choose one of pair_nequip, ase, batch")
    refused(trained.best, out, "--target", "pair_allegro", word="pair_style allegro would give wrong forces")
    refused(trained.best, out, "--compare", tmp_path / "none.nequip.pt2", word="none.nequip.pt2: no such file")
    refused(out, word="give MODEL")
    refused(trained.best, out, "--train-dir", tmp_path, word="not both")
    refused("--train-dir", tmp_path, out, word="neither best.ckpt nor last.ckpt")
    refused(trained.best, out, "--tolerance", "nan", word="--tolerance nan: give a force difference")
    refused(trained.best, out, "--compare", tmp_path / "no.pt2", word="--compare")
    refused(trained.best, out, "--device", "abacus", word="abacus")
    if not torch.cuda.is_available():
        refused(trained.best, out, "--device", "cuda", word="no CUDA device")
    refused(trained.best, tmp_path / "out.nequip.zip", "--target", "ase", word="--target: without effect")
    refused(trained.best, "/proc/out.nequip.zip", word="nothing can be written in the folder /proc")
    assert main(["info", str(out)]) == 2
    assert "no such file" in capsys.readouterr().err


def test_names_do_not_matter_for_reading(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(trained.best.read_bytes())
    assert main(["info", str(path)]) == 0
    assert "preset w8a16" in capsys.readouterr().out
    assert cli.main(["inspect", str(path)]) == 0
    assert "8 or more: " in capsys.readouterr().out
    assert main(["build", str(path), str(tmp_path / "out.nequip.zip")]) == 0
    (tmp_path / "out.nequip.zip").rename(tmp_path / "package")
    capsys.readouterr()
    assert main(["info", str(tmp_path / "package")]) == 0
    assert "preset w8a16, frozen" in capsys.readouterr().out
    assert adapter_for_file(tmp_path / "package").calculator(tmp_path / "package") is not None


def test_info_says_what_other_files_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "data.xyz": (b"1\n\nH 0 0 0\n", "a file of structures (XYZ)"),
        "stock.model": (b"\x80\x02cmace.modules.models\nScaleShiftMACE\n", "a MACE model. MACE is not installed here"),
        "empty": (b"", "an empty file"),
    }
    for name, (content, words) in files.items():
        (tmp_path / name).write_bytes(content)
        for call in (main, cli.main):
            assert call(["info" if call is main else "inspect", str(tmp_path / name)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert words in line


def test_a_deployed_file_that_gives_nan_does_not_agree() -> None:
    from ase import Atoms
    from ase.calculators.calculator import Calculator, all_changes

    class Constant(Calculator):
        implemented_properties = ("energy", "forces")

        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
            super().calculate(atoms, properties, system_changes)
            self.results = {"energy": 0.0, "forces": np.full((len(atoms), 3), self.value)}

    structures = [Atoms("H2", [[0, 0, 0], [0, 0, 1]])] * 2
    assert compare(Constant(1.0), Constant(1.5), structures).forces == 500.0
    assert np.isnan(compare(Constant(1.0), Constant(float("nan")), structures).forces)


def test_without_a_compiler_nothing_is_begun(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):  # monkeypatch would delete it for good
        assert main(["build", str(trained.best), str(tmp_path / "out.nequip.pt2")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nequip-deploy: compiled files need a C++ compiler, and no-such-compiler does not run here")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_kernels_that_cannot_be_built_are_left_out(
    quantized: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(dtype: Any) -> Path:
        raise native.CompilerError("no folder can keep compiled kernels")

    arguments = deploy_cli._parser().parse_args(["build", "model.ckpt", "out.nequip.pt2"])
    monkeypatch.setattr(native, "static_library", refuse)
    assert not deploy_cli._fuses(arguments, quantized())
    assert capsys.readouterr().err == (
        "nequip-deploy: NequIP's own convolution is used: no folder can keep compiled kernels\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", [pytest.param("ase", marks=pytest.mark.smoke), "pair_nequip"])
def test_compiled(
    trained: Any,
    trained_float: Any,
    command: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    target: str,
) -> None:
    """int8 stays int8 in the file, and stock NequIP runs it where this package cannot be imported."""
    from ase.io import read
    from test_files import by_calculator, run_without_plugin

    path = tmp_path / "out.nequip.pt2"
    assert main(["build", str(trained.best), str(path), "--target", target]) == 0
    out = capsys.readouterr().out
    facts = artefact.metadata(path)
    assert facts["gaq_preset"] == "w8a16"
    assert facts["gaq_trained"] == "1"
    assert open_file(path).training == "qat" if target == "ase" else True
    assert facts["type_names"] == "H C O"
    assert float(facts["r_max"]) == 4.0
    sizes = artefact.sections(path)
    assert int(facts["gaq_weight_bytes"]) < sizes.weights < int(facts["gaq_float_weight_bytes"]) / 3
    if target != "ase":
        assert facts["nequip_aoti_outputs"].split() == ["atomic_energy", "forces", "virial"]
        return
    assert "largest force difference" in out
    # The file has its own kernels, so tables of another form in a later version of this package do not concern it.
    with zipfile.ZipFile(path) as archive:
        (tmp_path / "library.so").write_bytes(archive.read(next(n for n in archive.namelist() if n.endswith(".so"))))
    names = subprocess.run(["nm", "-D", "--defined-only", tmp_path / "library.so"], capture_output=True, text=True)
    assert {"gaq_convolution_float32", "gaq_convolution_backward_float32"} <= set(names.stdout.split())
    structures = list(read(trained.folder / "test.xyz", ":"))
    expected = by_calculator(adapter_for_file(trained.best).calculator(trained.best), structures)
    assert np.allclose(run_without_plugin(path, trained.folder / "test.xyz"), expected, atol=5e-3)
    stock = tmp_path / "stock.nequip.pt2"
    # NequIP itself cannot compile a molecule without a cell: the same example in a box.
    from gaq_nequip.deploy.compile import save_data
    from gaq_nequip.example import example_data, with_cell

    save_data(with_cell(example_data(trained_float.best)), tmp_path / "data.pt")
    arguments = ["--mode", "aotinductor", "--device", "cpu", "--target", "ase", "--data-path", tmp_path / "data.pt"]
    done = command("nequip-compile", trained_float.best, stock, *arguments)
    assert done.returncode == 0, done.stderr
    assert artefact.sections(stock).weights / sizes.weights >= 4
    with zipfile.ZipFile(stock) as archive:
        symbols = b".debug_info" in archive.read(next(n for n in archive.namelist() if n.endswith(".so")))
    # torch 2.8 leaves no debug symbols in the stock file, torch 2.13 does.
    assert stock.stat().st_size / path.stat().st_size >= (4 if symbols else 2.2)
    # A compiled file is mostly code: what it holds is only compared with what another compiled file holds.
    for reference, word, value in (
        (trained_float.best, "not comparable", None),
        (stock, "pass", artefact.sections(stock).weights / sizes.weights),
    ):
        report = gaq.report(path, structures[:2], reference, progress=False)
        gate = report["gates"]["file_size_ratio"]
        assert (verdict(gate), gate["value"]) == (word, value)
        assert gate["enforced"] == (value is not None)
        assert ("compiled by nequip-compile" in gate["note"]) == (value is None)


@pytest.mark.slow
def test_stock_compile_of_a_quantized_checkpoint(trained: Any, command: Callable[..., Any], tmp_path: Path) -> None:
    """`nequip-compile` without our modifier: float weights, rounded as in training."""
    from ase.io import read
    from test_files import by_calculator, run_without_plugin

    from gaq_nequip.deploy.compile import save_data
    from gaq_nequip.example import example_data, with_cell

    path = tmp_path / "plain.nequip.pt2"
    save_data(with_cell(example_data(trained.best)), tmp_path / "data.pt")
    arguments = ["--mode", "aotinductor", "--device", "cpu", "--target", "ase", "--data-path", tmp_path / "data.pt"]
    done = command("nequip-compile", trained.best, path, *arguments)
    assert done.returncode == 0, done.stderr
    structures = list(read(trained.folder / "test.xyz", ":"))
    expected = by_calculator(adapter_for_file(trained.best).calculator(trained.best), structures)
    assert np.allclose(run_without_plugin(path, trained.folder / "test.xyz"), expected, atol=5e-3)


@pytest.mark.slow
def test_a_float_model_through_the_fused_kernels(trained_float: Any, tmp_path: Path) -> None:
    """The kernels with float weights, which benchmarks compare quantized files with: in float32 the same function."""
    from ase.io import read
    from test_files import by_calculator

    from gaq.kernels.cpu import native
    from gaq_nequip import files

    if not native.available():
        pytest.skip("needs a C++ compiler; `gaq doctor` says what is missing")
    path = tmp_path / "float.nequip.pt2"
    deploy_compile.compile_file(trained_float.best, path, "ase", "cpu", fused=True, frozen=False)
    assert "gaq_preset" not in artefact.metadata(path)
    with zipfile.ZipFile(path) as archive:
        library = next(name for name in archive.namelist() if name.endswith(".so"))
        assert b"torch.ops.gaq.edge_convolution" in archive.read(library)
    structures = list(read(trained_float.folder / "test.xyz", ":"))
    expected = by_calculator(adapter_for_file(trained_float.best).calculator(trained_float.best), structures)
    fused = by_calculator(files.CompiledModel(path, "cpu").calculator(), structures)
    assert np.allclose(fused, expected, atol=5e-5)


@pytest.mark.slow
def test_allegro(train: Callable[..., Any], tmp_path: Path) -> None:
    """The pair_allegro target of a quantized Allegro model."""
    pytest.importorskip("allegro", reason="needs Allegro: pip install '.[allegro]'")

    def changes(config: Any) -> None:
        config["quantization"] = "gaq"
        model = config["training_module"]["model"]
        for key in ("num_features", "radial_mlp_depth", "radial_mlp_width"):
            del model[key]
        model.update(
            {
                "_target_": "allegro.model.AllegroModel",
                "num_scalar_features": 16,
                "num_tensor_features": 8,
                "radial_chemical_embed": {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed"},
            }
        )

    run = train(tmp_path / "run", changes)
    assert run.code == 0, run.text
    for target in ("pair_allegro", "ase"):
        path = tmp_path / f"{target}.nequip.pt2"
        assert main(["build", str(run.best), str(path), "--target", target]) == 0
        assert artefact.metadata(path)["gaq_preset"] == "w8a16"


def test_the_noise_of_rounding_is_allowed_in_the_hosts_own_check() -> None:
    from nequip.utils.dtype import floating_point_tolerance

    before = floating_point_tolerance("float32")
    with deploy_compile.tolerating(1e-3 * default_tolerance(parse_config("gaq"))):
        assert floating_point_tolerance("float32") == 5e-3
        assert floating_point_tolerance("float64") < 1e-8
    with deploy_compile.tolerating(0.0):
        assert floating_point_tolerance("float32") == before
    with deploy_compile.tolerating(1e-3 * default_tolerance(parse_config("w8a8"))):
        assert before < floating_point_tolerance("float32") < float("inf")
    assert floating_point_tolerance("float32") == before


@pytest.mark.parametrize("suffix", [".nequip.zip", ".nequip.pt2"])
def test_the_model_is_loaded_once_and_frozen_once(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    import nequip.model.saved_models.load_utils as load_utils
    import nequip.scripts.compile as nequip_compile
    import nequip.utils.aot as aot

    from gaq_nequip import root

    loaded: list[str] = []
    frozen: list[Any] = []
    load, freeze = load_utils.load_saved_model, root.freeze

    def counted_load(path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append(str(path))
        return load(path, *args, **kwargs)

    def counted_freeze(model: Any, *args: Any, **kwargs: Any) -> Any:
        if state_of(model).status != "frozen":
            frozen.append(model)
        return freeze(model, *args, **kwargs)

    def stop(**keywords: Any) -> None:
        raise RuntimeError("nothing is compiled here")

    monkeypatch.setattr(load_utils, "load_saved_model", counted_load)
    monkeypatch.setattr(nequip_compile, "load_saved_model", counted_load)
    monkeypatch.setattr(root, "freeze", counted_freeze)
    monkeypatch.setattr(aot, "aot_export_model", stop)
    arguments = ["build", str(trained.best), str(tmp_path / f"out{suffix}")]
    if suffix == ".nequip.pt2":
        with pytest.raises(RuntimeError, match="nothing is compiled here"):
            main(arguments)
    else:
        assert main(arguments) == 0
    assert loaded.count(str(trained.best)) == 1
    assert len(frozen) == 1


def test_sizes_without_freezing(trained: Any) -> None:
    model = gaq.load(trained.best)
    assert deploy_sizes.unfolded_bytes(model) == deploy_sizes.packed_bytes(model, fold=False)[0]


def test_compiled_files_are_shown_without_being_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under any name; their library, which is none here, is not loaded."""
    path = tmp_path / "compiled"
    metadata = {"r_max": "4.0", "type_names": "H C O", "gaq_preset": "w8", "gaq_weight_bytes": "1234"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data/aotinductor/model/a.so", b"no library")
        archive.writestr("x/data/aotinductor/model/a_metadata.json", json.dumps(metadata))
    assert main(["info", str(path)]) == 0
    assert "gaq_preset                   w8" in capsys.readouterr().out
    assert cli.main(["inspect", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kind"], result["bytes"]) == ("a compiled NequIP model", 1234)
    assert cli.main(["inspect", str(path), "--sensitivity", str(path)]) == 2
    assert "is a compiled NequIP model" in capsys.readouterr().err
    assert cli.main(["quantize", str(path), "-o", str(tmp_path / "out.ckpt")]) == 2
    assert "a compiled file cannot be changed" in capsys.readouterr().err
