"""The command `gaq` on MACE models: results, exit codes, and one clear line for every bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from e3nn.util.jit import compile as jit_compile
from nobody import as_nobody

import gaq
from gaq.cli import main
from gaq.model.state import state_of

SUBJECTS = ("model", "reference")
TINY = "{preset: gaq, calibration: {frames: 3}, distillation: {steps: 2, batch_atoms: 16}}"


@pytest.fixture(scope="module")
def folder(
    float_model: Callable[..., Any],
    quantized: Callable[..., Any],
    evaluate: Callable[..., Any],
    structures: list[Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A float model, a quantized one, and structures with the float model's own labels."""
    path = tmp_path_factory.mktemp("cli")
    model = float_model()
    torch.save(model, path / "float.model")
    gaq.save(quantized("gaq"), path / "gaq.model")
    labelled = []
    for seed in range(1):
        for one in structures[:2]:
            atoms = one.copy()
            atoms.positions += np.random.default_rng(seed).normal(scale=0.03, size=atoms.positions.shape)
            energy, forces = evaluate(model, [atoms])
            generator = np.random.default_rng(seed + 10)
            atoms.info["REF_energy"] = float(energy[0]) + 0.05
            atoms.arrays["REF_forces"] = forces + generator.normal(scale=0.1, size=forces.shape)
            labelled.append(atoms)
    ase.io.write(path / "data.xyz", labelled, format="extxyz")
    gold = [ase.Atoms("Au2", positions=[[0, 0, 0], [0, 0, 2.5]])]
    ase.io.write(path / "gold.xyz", gold, format="extxyz")
    single = ase.Atoms("C", cell=[3.0] * 3, pbc=True)
    ase.io.write(path / "single.xyz", [single, single], format="extxyz")
    double = labelled[1].copy()
    double.positions[2] = double.positions[0]
    ase.io.write(path / "double.xyz", [labelled[0], double], format="extxyz")
    ase.io.write(path / "apart.xyz", [ase.Atoms("C2", positions=[[0, 0, 0], [0, 0, 30.0]])], format="extxyz")
    (path / "empty.xyz").write_text("")
    (path / "noise.xyz").write_text("these are\nnot structures\n")
    return path


@pytest.mark.smoke
def test_quantize_inspect_report(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    evaluate: Callable[..., Any],
    structures: list[Any],
) -> None:
    """The whole way of a user: each command reads what the one before wrote."""
    output = tmp_path / "quantized.model"
    data, reference = str(folder / "data.xyz"), str(folder / "float.model")
    arguments = ["quantize", reference, "-o", str(output), "--config", TINY, "--calibration", data, "--force"]
    code = main(arguments)
    printed = capsys.readouterr().out
    assert code in (0, 1), printed
    assert output.name in printed
    assert "times smaller" in printed
    assert [file.name for file in tmp_path.iterdir()] == [output.name]
    model = gaq.load(output)
    state = state_of(model)
    assert state.status == "converted"
    assert state.config.distillation.steps == 2
    distilled = state.notes["distillation"]
    names = [f"force_rms_{name}_mev_per_angstrom" for name in ("before", "after", "target")]
    before, after, target = (distilled[name] for name in names)
    assert after <= before
    assert (distilled["steps"] == 0) == (before <= target)
    gates = state.notes["gates"]
    failed = [name for name, gate in gates.items() if gate["enforced"] and gate["passed"] is False]
    assert state.notes["failed_gates"] == failed
    assert code == (1 if failed else 0)
    assert {name for name, gate in gates.items() if gate["passed"]} >= {"force_difference", "lee", "file_size_ratio"}
    known = structures[:2]  # the molecules of the calibration data
    ours, theirs = evaluate(model, known), evaluate(gaq.load(reference), known)
    assert np.abs(ours[1] - theirs[1]).mean() < 0.05 * np.abs(theirs[1]).mean()

    assert main(["inspect", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "converted" in printed
    for text in ("interactions.0.linear_up", "readouts.1.linear_2", "int14", "int16", "spherical_harmonics", "total"):
        assert text in printed
    assert ("MARKED" in printed) == bool(failed)
    for line in printed.splitlines():
        if "int16" in line or "int14" in line:
            assert "8 or more: " in line
    assert "w8a16 asks for 8 bits or more, so wider ones are as intended" in printed
    assert "scalars (l=0) have 24, because" in printed
    assert main(["inspect", reference]) == 0
    assert "a float model" in capsys.readouterr().out

    report = tmp_path / "report"
    code = main(
        ["report", str(output), "--data", data, "-o", str(report), "--reference", reference, "--nve-ps", "0.02"]
    )
    assert code in (0, 1)
    printed = capsys.readouterr().out
    result = json.loads((report / "report.json").read_text())
    assert (report / "report.html").stat().st_size > 0
    enforced = [name for name, gate in result["gates"].items() if gate["enforced"] and gate["passed"] is False]
    assert code == (1 if enforced else 0)
    assert {"model", "reference", "versions", "hardware", "command", "gates"} <= result.keys()
    measured = result["model"]
    assert 60 < measured["force_mae_mev_per_angstrom"] < 110  # the labels carry noise of 0.1 eV/Å: 80 in the mean
    assert measured["file_bytes"] == output.stat().st_size
    assert measured["lee_mev_per_angstrom"] < 0.15
    assert measured["central_difference_relative_error"]["0.01"] > 0
    assert "drift_mev_per_atom_per_ps" in measured["nve"]
    assert "lee" in printed


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    """What a report holds of numbers and words, by path, without what depends on the clock and the process.

    The ratio of two rounding errors depends on the process too: memory that lies elsewhere is summed in another order.
    """
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        if key not in ("seconds_per_step", "peak_bytes", "engine_error_ratio", "engine"):
            found |= numbers(item, f"{path}/{key}".strip("/"))
    return found


@pytest.mark.slow
def test_python_and_the_command_measure_and_judge_alike(folder: Path, tmp_path: Path) -> None:
    """Central differences of float32 energies would be ten times the float64 ones, and another verdict."""
    from ase.io import read

    from gaq.reporting import write_report

    model, reference, data = (str(folder / name) for name in ("gaq.model", "float.model", "data.xyz"))
    arguments = ["report", model, "--data", data, "--reference", reference, "--nve-ps", "0.02", "--trained"]
    code = main([*arguments, "-o", str(tmp_path / "report")])
    by_command = json.loads((tmp_path / "report" / "report.json").read_text())
    report = gaq.report(model, read(data, ":"), reference, nve_ps=0.02, trained=True, progress=False)
    by_python = json.loads(write_report(report, tmp_path / "by_python")[0].read_text())
    parts = [*SUBJECTS, "gates"]
    python, command = (numbers({part: report[part] for part in parts}) for report in (by_python, by_command))
    assert python.keys() == command.keys()
    for path, value in python.items():
        # The rotation error of a sound model is rounding, of 1e-9 meV/Å.
        expected = pytest.approx(command[path], rel=1e-4, abs=1e-6) if isinstance(value, float) else command[path]
        assert value == expected or path.endswith(("lee_naive_ratio", "lee_against_naive/value")), path
    assert by_python["model"]["engine_error_ratio"] > 0
    assert code == (1 if any(g["enforced"] and g["passed"] is False for g in by_command["gates"].values()) else 0)
    assert by_python["model"]["training"] == "qat"


def test_float_models_are_reported_without_gates(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ase.io import read

    path, data = str(folder / "float.model"), str(folder / "data.xyz")
    report = gaq.report(path, read(data, ":"), progress=False)
    assert report["model"]["preset"] == "float"
    assert report["model"]["force_mae_mev_per_angstrom"] > 0
    assert report["gates"] == {}
    assert main(["report", path, "--data", data, "--nve-ps", "0", "-o", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "a float model: no gates apply" in printed
    assert "Force MAE" in printed
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.slow
def test_trained_model_passes_its_gates(
    trained_file: Path, trained_frames: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ase.io.write(tmp_path / "data.xyz", trained_frames, format="extxyz")
    output = tmp_path / "out.model"
    config = "{preset: gaq, distillation: {steps: 40}}"
    arguments = ["quantize", str(trained_file), "-o", str(output), "--config", config]
    code = main([*arguments, "--calibration", str(tmp_path / "data.xyz")])
    assert code == 0, capsys.readouterr().out
    assert trained_file.stat().st_size >= 4 * output.stat().st_size


def test_safetensors_output(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is calibrated here, but the gates need structures, unless the file may be written unjudged."""
    output = tmp_path / "quantized.safetensors"
    config = tmp_path / "config.yml"
    config.write_text("quantization:\n  preset: w8\n  weights: {rounding: nearest}\n  distillation: {steps: 0}\n")
    arguments = ["quantize", folder / "float.model", "-o", output, "--config", config]
    assert "gates need structures: give --calibration" in refused(capsys, *arguments)
    assert not output.exists()
    assert main([*map(str, arguments), "--force"]) == 0
    assert state_of(gaq.load(output)).config.preset == "w8"
    capsys.readouterr()
    assert main(["inspect", str(output)]) == 0
    assert "MARKED: written with --force and without structures" in capsys.readouterr().out


def test_failed_gate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1 and nothing written, unless forced, and then the file is marked."""

    def measure(*_: Any, **__: Any) -> dict[str, Any]:
        gate = {"value": 3.0, "bound": 0.15, "unit": "meV/Å", "note": "", "comparison": "<="}
        printed = {**gate, "passed": False, "enforced": False}
        return {"gates": {"lee": {**gate, "passed": False, "enforced": True}, "engine": printed}}

    monkeypatch.setattr("gaq.api.report", measure)
    output = tmp_path / "bad.model"
    arguments = ["quantize", str(folder / "float.model"), "-o", str(output), "--config", TINY]
    arguments += ["--calibration", str(folder / "data.xyz")]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("gaq: not written, because lee failed")
    assert "--force" in error
    assert not list(tmp_path.iterdir())
    assert main([*arguments, "--force"]) == 1
    notes = state_of(gaq.load(output)).notes
    assert notes["failed_gates"] == ["lee"]
    assert notes["gates"]["lee"] == {"value": 3.0, "bound": 0.15, "passed": False, "enforced": True}
    capsys.readouterr()
    assert main(["inspect", str(output)]) == 0
    assert "MARKED: written with --force although these gates failed: lee" in capsys.readouterr().out


@pytest.mark.smoke
def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for text in ("torch", "mace-torch", "mace ", "ready", "kernels", "reference"):
        assert text in printed


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("gaq: "), error
    assert error.strip().count("\n") == 0, error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("w8a15", ("quantization", "not a preset", "w8a8")),
        ("{preset: gaq, weigths: {bits: 8}}", ("quantization.weigths", "Did you mean 'weights'?")),
        ("{weights: {bitz: 8}}", ("quantization.weights.bitz", "unknown key")),
        ("{weights: {bits: eight}}", ("quantization.weights.bits", "expected int")),
        ("{weights: 8}", ("quantization.weights", "expected a mapping")),
        ("{weights: {bits: 17}}", ("quantization.weights.bits", "17 bits cannot be stored")),
        ("{scalars: {bits: 1}}", ("quantization.scalars.bits", "1 bits")),
        ("{vectors: {codebook: cube}}", ("quantization.vectors.codebook", "octahedral")),
        ("{calibration: {headroom: 0.5}}", ("quantization.calibration.headroom", "too small")),
        ("{weights: null, scalars: null, vectors: null}", ("nothing would be quantized",)),
        ("{overrides: {'readout.*': null}}", ("readout.*", "matches no module", "readouts.0.linear")),
        ("{overrides: {'*': null}}", ("nothing would be quantized",)),
        ("{overrides: {'readouts.*': w9}}", ("readouts.*", "w9")),
        ("{weights: {bits: 8}", ("cannot read the mapping",)),
        ("missing.yml", ("no file", "missing.yml")),
    ],
)
def test_bad_configuration(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, words: tuple[str, ...]
) -> None:
    output = tmp_path / "out.model"
    error = refused(
        capsys,
        *("quantize", folder / "float.model", "-o", output, "--config", config, "--calibration", folder / "data.xyz"),
    )
    for word in words:
        assert word in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("missing.xyz", ("missing.xyz", "does not exist")),
        ("empty.xyz", ("empty.xyz", "empty")),
        ("noise.xyz", ("noise.xyz",)),
        (".", ("directory",)),
        ("gold.xyz", ("Au", "H, C, O")),
        ("single.xyz", ("single atom", "repeat the cell")),
        ("double.xyz", ("frame 1", "atoms 0 (O) and 2 (H) are at one place")),
        (None, ("--calibration",)),
    ],
)
def test_bad_data(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: str | None,
    words: tuple[str, ...],
) -> None:
    arguments = ["quantize", folder / "float.model", "-o", tmp_path / "out.model", "--config", TINY]
    if data is not None:
        arguments += ["--calibration", folder / data]
    error = refused(capsys, *arguments)
    for word in words:
        assert word in error
    assert not list(tmp_path.iterdir())
    if data is not None:
        error = refused(capsys, "report", folder / "gaq.model", "--data", folder / data, "-o", tmp_path / "report")
        for word in words:
            assert word in error
        assert not list(tmp_path.iterdir())


def test_isolated_atoms_are_no_calibration(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All forces are zero in any model, so nothing could fail."""
    output = tmp_path / "out.model"
    error = refused(capsys, "quantize", folder / "float.model", "-o", output, "--calibration", folder / "apart.xyz")
    assert "no two atoms are within its cutoff" in error
    assert not list(tmp_path.iterdir())
    error = refused(capsys, "inspect", folder / "float.model", "--sensitivity", folder / "apart.xyz")
    assert "no two atoms are within its cutoff" in error


@pytest.mark.slow
def test_quantize_without_a_home(folder: Path, tmp_path: Path) -> None:
    arguments = ["quantize", folder / "float.model", "-o", tmp_path / "out.model", "--config", TINY, "--force"]
    done = as_nobody(tmp_path, "gaq.cli:main", *arguments, "--calibration", folder / "data.xyz")
    assert done.returncode in (0, 1), done.stderr
    assert "gaq: this user has no home" in done.stderr
    assert "Traceback" not in done.stderr
    assert state_of(gaq.load(tmp_path / "out.model")).status == "converted"
    done = as_nobody(tmp_path, "gaq_mace.commands:create_lammps_model", tmp_path / "out.model")
    assert done.returncode == 0, done.stderr
    done = as_nobody(tmp_path, "gaq_mace.commands:train", "--help")
    assert done.returncode == 0, done.stderr
    assert "--quantization" in done.stdout


def test_gates_over_isolated_atoms_are_not_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["report", folder / "gaq.model", "--data", folder / "apart.xyz"]
    assert main([*map(str, arguments), "--nve-ps", "0", "-o", str(tmp_path)]) == 0
    gates = json.loads((tmp_path / "report.json").read_text())["gates"]
    assert {name for name, gate in gates.items() if gate["passed"] is not None} <= {"finite", "file_size_ratio"}
    printed = capsys.readouterr().out
    for name in ("lee", "lee_against_naive", "central_difference", "engine"):
        assert f"not measured: {name}: no force acts on any atom of the structures" in printed


def test_keys_of_labels(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that is named but absent ends the command at once; named as in the data, its labels are used."""
    frames = ase.io.read(folder / "data.xyz", ":")
    for atoms in frames:
        atoms.info["dft_energy"], atoms.arrays["dft_forces"] = atoms.info.pop("REF_energy"), atoms.arrays["REF_forces"]
        del atoms.arrays["REF_forces"]
    ase.io.write(tmp_path / "data.xyz", frames, format="extxyz")
    calibrated = ("quantize", folder / "float.model", "-o", tmp_path / "out.model", "--calibration")
    measured = ("report", folder / "float.model", "-o", tmp_path / "report", "--nve-ps", "0", "--data")
    for start in (calibrated, measured):
        error = refused(capsys, *start, tmp_path / "data.xyz", "--energy-key", "energy_dft")
        assert "no structure has info['energy_dft']; present in info: dft_energy" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.xyz"]
    keys = ("--energy-key", "dft_energy", "--forces_key", "dft_forces")  # both spellings
    assert main([*map(str, measured), str(tmp_path / "data.xyz"), *keys]) == 0
    named = json.loads((tmp_path / "report" / "report.json").read_text())["model"]
    assert main([*map(str, measured), str(folder / "data.xyz")]) == 0
    default = json.loads((tmp_path / "report" / "report.json").read_text())["model"]
    for metric in ("force_mae_mev_per_angstrom", "energy_mae_mev_per_atom"):
        assert named[metric] == pytest.approx(default[metric])
        assert named[metric] is not None


def test_bad_input_ends_before_the_long_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is prepared or calibrated, and no graph is made."""
    for name in ("gaq.api.prepare", "gaq.api.calibrate", "gaq_mace.adapter.make_batches"):
        monkeypatch.setattr(name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    cases = {"gold": "does not know", "double": "at one place", "single": "a single atom"}
    start = ("quantize", folder / "float.model", "-o", tmp_path / "out.model", "--calibration")
    for name, words in cases.items():
        assert words in refused(capsys, *start, folder / f"{name}.xyz")
    assert "the model does not know Fe" in refused(capsys, *start, folder / "data.xyz", "--elements", "H,Fe")
    assert "no head 'third'" in refused(capsys, *start, folder / "data.xyz", "--head", "third")
    assert not list(tmp_path.iterdir())


def test_bad_models(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], float_model: Callable[..., Any]
) -> None:
    truncated = tmp_path / "truncated.model"
    truncated.write_bytes((folder / "float.model").read_bytes()[:20000])
    half = tmp_path / "half.model"
    half.write_bytes((folder / "gaq.model").read_bytes()[:-3000])
    script = tmp_path / "script.model"
    torch.jit.save(jit_compile(float_model()), script)
    other = tmp_path / "other.onnx"
    other.write_text("x")
    linear = tmp_path / "linear.model"
    torch.save(torch.nn.Linear(2, 2), linear)
    cases = {
        tmp_path / "missing.model": "no such file",
        truncated: "truncated",
        half: "truncated",
        script: "TorchScript",
        other: "onnx",
        linear: "holds a Linear",
        tmp_path: "",
    }
    before = sorted(tmp_path.iterdir())
    output = tmp_path / "out.model"
    data = folder / "data.xyz"
    for path, words in cases.items():
        for arguments in (
            ("quantize", path, "-o", output, "--config", TINY, "--calibration", data),
            ("inspect", path),
            ("report", path, "--data", data, "-o", tmp_path / "report", "--nve-ps", "0"),
        ):
            error = refused(capsys, *arguments)
            assert str(path) in error
            assert words in error
    assert sorted(tmp_path.iterdir()) == before


def test_bad_output_and_order(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--config", TINY, "--calibration", folder / "data.xyz")
    error = refused(capsys, "quantize", folder / "float.model", "-o", tmp_path / "no" / "out.model", *data)
    assert "does not exist" in error
    error = refused(capsys, "quantize", folder / "gaq.model", "-o", tmp_path / "out.model", *data)
    assert "already quantized" in error
    before = (folder / "float.model").read_bytes()
    error = refused(capsys, "quantize", folder / "float.model", "-o", folder / "float.model", *data)
    assert "input model itself" in error
    assert (folder / "float.model").read_bytes() == before
    (tmp_path / "taken.model").mkdir()
    error = refused(capsys, "quantize", folder / "float.model", "-o", tmp_path / "taken.model", *data)
    assert "is a folder" in error
    (tmp_path / "taken.model").rmdir()
    if not torch.cuda.is_available():
        error = refused(capsys, "inspect", folder / "gaq.model", "--device", "cuda")
        assert "no CUDA device" in error
    assert "device" in refused(capsys, "inspect", folder / "gaq.model", "--device", "abacus")
    assert not list(tmp_path.iterdir())


def test_bad_numbers_of_the_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("report", folder / "gaq.model", "--data", folder / "data.xyz", "-o", tmp_path / "report")
    for option in (("--nve-ps", "-1"), ("--frames", "0"), ("--reference", tmp_path / "missing.model")):
        error = refused(capsys, *arguments, *option)
        assert option[0].lstrip("-").split("-")[0] in error or "missing.model" in error
    assert not list(tmp_path.iterdir())
    (tmp_path / "report").write_text("taken")
    assert "is a file" in refused(capsys, *arguments)
    assert "is a file" in refused(capsys, *arguments[:-1], tmp_path / "report" / "below")


def test_usage_errors() -> None:
    for arguments in ([], ["melt"], ["quantize"], ["report", "m.model", "--data", "d", "-o", "r", "--nve-ps", "long"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def messages(error: str) -> list[str]:
    """Lines on stderr, without those about what takes over two seconds, as on a slow machine."""
    return [line for line in error.splitlines() if not line.startswith(("loading ", "importing ", "reading "))]


@pytest.mark.smoke
def test_streams_of_the_command(python: Callable[..., Any], folder: Path) -> None:
    """In a process of its own, with warnings on: results on stdout, and on stderr nothing but the error."""
    code = "import sys; from gaq.cli import main; sys.exit(main(sys.argv[1:]))"
    path = str(folder / "gaq.model")
    done = python(
        f"import warnings; warnings.resetwarnings()\nwarnings.simplefilter('default', UserWarning)\n{code}",
        "inspect",
        path,
    )
    assert done.returncode == 0
    assert f"{path}: preset w8a16, converted" in done.stdout
    assert messages(done.stderr) == []
    done = python(code, "inspect", "no.model")
    assert done.returncode == 2
    assert messages(done.stderr) == ["gaq: no.model: no such file."]
    assert "no.model" not in done.stdout


def as_json(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> dict[str, Any]:
    """The result of a command with ``--json``: all that is on stdout."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["gaq"] == gaq.__version__
    return result


def test_results_as_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The keys of docs/commands.md; scripts read them."""
    output, data = tmp_path / "out.safetensors", folder / "data.xyz"
    config = "{preset: w8, weights: {rounding: nearest}, distillation: {steps: 0}}"
    result = as_json(
        capsys, "quantize", folder / "float.model", "-o", output, "--config", config, "--elements", "H,C,O", "--force"
    )
    assert result["output"] == str(output)
    assert result["output_bytes"] == output.stat().st_size
    assert result["times_smaller"] == pytest.approx(result["model_bytes"] / result["output_bytes"])
    assert (result["preset"], result["gates"], result["failed_gates"]) == ("w8", {}, [])
    assert set(result) == documented("quantize")

    result = as_json(capsys, "inspect", output)
    assert set(result) == documented("inspect")
    assert (result["preset"], result["status"]) == ("w8", "converted")
    rows = {row["name"]: row for row in result["modules"]}
    assert rows["interactions.0.linear_up"]["expected"].startswith("8")
    assert result["bytes"] == sum(row["bytes"] for row in rows.values())
    float_model = as_json(capsys, "inspect", folder / "float.model", "--sensitivity", data)
    assert float_model["preset"] is None
    assert {row["expected"] for row in float_model["modules"]} == {"-"}
    assert len(float_model["sensitivity"]) > 5

    folder_of_report = tmp_path / "report"
    arguments = ("report", output, "--data", data, "--nve-ps", "0", "--reference", folder / "float.model")
    capsys.readouterr()
    code = main([*map(str, arguments), "-o", str(folder_of_report), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert set(result) == documented("report")
    written = json.loads((folder_of_report / "report.json").read_text())
    assert {key: result[key] for key in written} == written
    assert code == (1 if result["failed_gates"] else 0)


def documented(command: str) -> set[str]:
    """The keys at the top of a result, in docs/commands.md."""
    text = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {command} |")]
    cells = row.split("|")[2].replace("each with", "|").split(";")
    return {"gaq", *(key for cell in cells for key in re.findall(r"`(\w+)`", cell.split("|")[0]))}


def test_unforced_failure_as_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {"value": 3.0, "bound": 0.15, "unit": "meV/Å", "note": "", "comparison": "<=", "passed": False}
    monkeypatch.setattr("gaq.api.report", lambda *_, **__: {"gates": {"lee": {**gate, "enforced": True}}})
    start = ("quantize", folder / "float.model", "-o", tmp_path / "out.model", "--config", TINY)
    result = as_json(capsys, *start, "--calibration", folder / "data.xyz", code=1)
    assert (result["output"], result["times_smaller"], result["failed_gates"]) == (None, None, ["lee"])


@pytest.mark.slow
def test_names_do_not_matter_for_reading(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Caches of foundation models have files without a suffix."""
    gaq.save(gaq.load(folder / "gaq.model"), tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(tmp_path / "20231210mace128L0_energy_epoch249model")
    for name, words in (("float.model", "a float model"), ("gaq.model", "preset w8a16")):
        (tmp_path / Path(name).stem).write_bytes((folder / name).read_bytes())
        assert words in as_text(capsys, "inspect", tmp_path / Path(name).stem)
    path = tmp_path / "20231210mace128L0_energy_epoch249model"
    assert "preset w8a16" in as_text(capsys, "inspect", path)
    report = ("report", path, "--data", folder / "data.xyz", "--nve-ps", "0", "--reference", tmp_path / "float")
    assert "force_difference" in as_text(capsys, *report, "-o", tmp_path / "report")
    config = "{preset: w8, weights: {rounding: nearest}, distillation: {steps: 0}}"
    quantize = ("quantize", tmp_path / "float", "-o", tmp_path / "out.model", "--config", config, "--force")
    assert "times smaller" in as_text(capsys, *quantize, "--elements", "H,C")


def as_text(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) in (0, 1)
    return capsys.readouterr().out


def test_exports_can_be_inspected_only(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gaq_mace.commands import create_lammps_model

    path = tmp_path / "mliap.pt"
    assert create_lammps_model([str(folder / "gaq.model"), "--format", "mliap", "-o", str(path)]) == 0
    printed = as_text(capsys, "inspect", path)
    assert "preset w8a16, converted (a MACE model exported for LAMMPS (ML-IAP))" in printed
    assert "interactions.0.linear_up" in printed
    data = ("--calibration", folder / "data.xyz")
    assert "give the .model file" in refused(capsys, "quantize", path, "-o", tmp_path / "out.model", *data)


def test_every_value_is_checked_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gaq_mace.files.load", "gaq.checks.errors.read_structures"):
        monkeypatch.setattr(name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    model, data, out = folder / "float.model", folder / "data.xyz", tmp_path / "out.model"
    quantize = ("quantize", model, "-o", out, "--calibration", data)
    report = ("report", model, "--data", data, "-o", tmp_path / "report")
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("quantize", tmp_path / "missing.model", "-o", out), "missing.model: no such file"),
        (("quantize", data, "-o", out), "data.xyz: a file of structures (XYZ)"),
        (("quantize", model, "-o", tmp_path / "x.ckpt"), "has to end in .model or .safetensors"),
        (("quantize", model, "-o", tmp_path / "x.pt"), "has to end in .model or .safetensors"),
        (("quantize", model, "-o", tmp_path / "x"), "has to end in .model or .safetensors"),
        (("quantize", model, "-o", "/proc/x.model"), "nothing can be written in the folder /proc"),
        (("quantize", model, "-o", out), "give --calibration"),
        (("quantize", model, "-o", out, "--calibration", tmp_path / "no.xyz"), "--calibration"),
        ((*quantize, "--config", "w9"), "w9"),
        ((*quantize, "--device", "abacus"), "abacus"),
        (("inspect", model, "--device", "abacus"), "abacus"),
        (("inspect", model, "--sensitivity", tmp_path / "no.xyz"), "--sensitivity"),
        ((*report, "--device", "abacus"), "abacus"),
        ((*report, "--nve-ps", "nan"), "--nve-ps nan"),
        ((*report, "--nve-ps", "inf"), "--nve-ps inf"),
        ((*report, "--frames", "0"), "--frames 0"),
        ((*report, "--reference", tmp_path / "no.model"), "--reference"),
        ((*report, "--reference", data), "--reference"),
        (("report", model, "--data", tmp_path / "no.xyz", "-o", tmp_path), "--data"),
        (("report", model, "--data", data, "-o", "/proc/report"), "/proc"),
    ]
    if not torch.cuda.is_available():
        cases += [((*quantize, "--device", "cuda"), "no CUDA device"), ((*report, "--device", "cuda"), "no CUDA")]
    for arguments, words in cases:
        assert words in refused(capsys, *arguments), arguments
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_report_on_a_stream_of_ascii(folder: Path, tmp_path: Path, python: Callable[..., Any]) -> None:
    arguments = ("report", folder / "gaq.model", "--data", folder / "data.xyz", "--nve-ps", "0")
    reference = ("--reference", folder / "float.model", "-o", tmp_path / "report")
    code = "import sys; from gaq.cli import main; sys.exit(main(sys.argv[1:]))"
    done = python(code, *arguments, *reference, PYTHONIOENCODING="ascii")
    assert "Traceback" not in done.stderr
    assert "meV/A" in done.stdout
    assert "report.html" in done.stdout
