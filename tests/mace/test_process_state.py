"""No call leaves process-wide state changed, whether it returns or raises. In a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gaq

CALLS = """
import sys
from pathlib import Path
import mace
import pytest
import torch
import gaq
from gaq import cli
from gaq.adapter import adapter_for_file, adapters
from process_state import differing, state

adapters()  # what frameworks change as they are imported is theirs
import mace.calculators, mace.cli.run_train
import gaq_mace.calculator, gaq_mace.commands as commands
from ase.io import read, write
from mace.modules import models

path, stock, folder = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
frames = read(folder / "frames.xyz", ":")
broken = folder / "broken.model"
broken.write_bytes(path.read_bytes()[:5000])
failed = []

def unchanged(name, call, raises=None, but=None):
    before = state()
    result = None
    try:
        result = call()
        if raises is not None:
            failed.append(f"{name}: did not raise")
    except BaseException as error:
        if raises is None or not isinstance(error, raises):
            raise
    failed.extend(f"{name}: {line}" for line in differing(before, state()) if but is None or not line.startswith(but))
    return result

class Stop(RuntimeError):
    pass

def stop(*arguments, **keywords):
    raise Stop("in the middle")

def written(suffix):
    return str(path) if suffix == ".model" else str(path.with_suffix(suffix))

assert torch.get_default_dtype() == torch.float32
for suffix in (".model", ".safetensors"):
    model = unchanged("load", lambda: gaq.load(written(suffix)))
    assert next(model.parameters()).dtype == torch.float64
    calculator = unchanged("calculator", lambda: adapter_for_file(written(suffix)).calculator(written(suffix)))
    atoms = frames[0].copy()
    atoms.calc = calculator
    # Of random numbers MACE itself takes one, for its DataLoader, where it makes a batch.
    energy = unchanged("energy", atoms.get_potential_energy, but="random")
    unchanged("a second step", lambda: (atoms.rattle(0.01, seed=1), atoms.get_forces()), but="random")
    unchanged("Hessian", lambda: calculator.get_hessian(atoms), but="random")
    unchanged("descriptors", lambda: calculator.get_descriptors(atoms), but="random")
    found = unchanged("potential", lambda: adapter_for_file(path).potential(model)([frames[0]]))
    assert abs(found[0][0] - energy) < 1e-9, (found, energy)
    unchanged("save", lambda: gaq.save(model, folder / f"again{suffix}"))
unchanged("load a broken file", lambda: gaq.load(broken), ValueError)
unchanged("summary", lambda: gaq.summary(model))
unchanged("inspect", lambda: cli.main(["inspect", str(path)]))
unchanged("doctor", lambda: cli.main(["doctor"]))
unchanged("bad input", lambda: cli.main(["inspect", str(broken)]))
options = ["-o", str(folder / "quantized.model"), "--config", "{preset: w8, distillation: {steps: 0}}", "--force"]
unchanged("quantize", lambda: cli.main(["quantize", str(stock), *options]))
unchanged("lammps", lambda: commands.create_lammps_model([str(path), "--format", "mliap", "--dtype", "float32"]))
unchanged("lammps, bad input", lambda: commands.create_lammps_model([str(path), "--head", "other"]))

commands._write = stop
unchanged("lammps that stops", lambda: commands.create_lammps_model([str(path)]), Stop)
models.ScaleShiftMACE.__init__ = stop
for suffix in (".model", ".safetensors"):
    unchanged("a constructor that stops", lambda: gaq.load(written(suffix)), ValueError)
    unchanged("a command that stops", lambda: cli.main(["inspect", written(suffix)]))
type(adapter_for_file(path)).load_export = stop
unchanged("a command that raises", lambda: cli.main(["inspect", str(path)]), Stop)
print("FAILED" + "\\n".join(failed))
"""


@pytest.mark.slow
def test_calls(
    quantized: Callable[..., Any], float_model: Callable[..., Any], structures: list[Any], tmp_path: Path
) -> None:
    import ase.io

    path, stock = tmp_path / "model.model", tmp_path / "stock.model"
    for suffix in (".model", ".safetensors"):
        gaq.save(quantized("gaq", dtype=torch.float64), path.with_suffix(suffix))
    torch.save(float_model(dtype=torch.float64), stock)
    ase.io.write(tmp_path / "frames.xyz", structures[:2], format="extxyz")
    root = Path(__file__).parents[2]
    search = os.pathsep.join([str(root / "tests" / "helpers"), str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CALLS, str(path), str(stock), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.split("FAILED")[1].strip() == ""
