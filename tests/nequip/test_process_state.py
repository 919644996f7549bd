"""No call leaves process-wide state changed, whether it returns or raises.

Tested in a fresh process, because NequIP sets itself up once per process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

CALLS = """
import sys, tempfile
from pathlib import Path
import torch
import gaq
from gaq import cli
from gaq.adapter import adapter_for_file, adapters
from process_state import differing, state

adapters()  # changes that frameworks make when they are imported do not count
import nequip.scripts.compile, nequip.model, nequip.train, nequip.integrations.ase
import gaq_nequip.deploy.cli as deploy, gaq_nequip.deploy.compile
from ase.io import read

checkpoint, data, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
frames = read(data, ":")
broken = folder / "broken.ckpt"
broken.write_bytes(checkpoint.read_bytes()[:5000])
failed = []

def unchanged(name, call, raises=None):
    before = state()
    try:
        result = call()
        if raises is not None:
            failed.append(f"{name}: did not raise")
    except Exception as error:
        result = None
        if raises is None or not isinstance(error, raises):
            raise
    failed.extend(f"{name}: {line}" for line in differing(before, state()))
    return result

class Stop(RuntimeError):
    pass

def stop(*arguments, **keywords):
    raise Stop("in the middle")

assert torch.get_default_dtype() == torch.float32
model = unchanged("load", lambda: gaq.load(checkpoint))
unchanged("load a broken file", lambda: gaq.load(broken), ValueError)
calculator = unchanged("calculator", lambda: adapter_for_file(checkpoint).calculator(checkpoint))
atoms = frames[0].copy()
atoms.calc = calculator
energy = unchanged("energy", atoms.get_potential_energy)
unchanged("a second step", lambda: (atoms.rattle(0.01, seed=1), atoms.get_forces()))
batches = unchanged("batches", lambda: adapter_for_file(checkpoint).batches(model, frames, 2))
assert batches[0]["pos"].dtype == torch.float64
energies_and_forces = unchanged("potential", lambda: adapter_for_file(checkpoint).potential(model)([frames[0]]))
assert abs(energies_and_forces[0][0] - energy) < 1e-4, (energies_and_forces, energy)
unchanged("convert", lambda: gaq.convert(model))
unchanged("summary", lambda: gaq.summary(model))
unchanged("save", lambda: gaq.save(model, folder / "saved.nequip.zip"))
unchanged("inspect", lambda: cli.main(["inspect", str(checkpoint)]))
unchanged("doctor", lambda: cli.main(["doctor"]))
unchanged("bad input", lambda: cli.main(["inspect", str(broken)]))
unchanged("deploy", lambda: deploy.main(["build", str(checkpoint), str(folder / "out.nequip.zip")]))
unchanged("deploy info", lambda: deploy.main(["info", str(folder / "out.nequip.zip")]))
unchanged("deploy bad input", lambda: deploy.main(["build", str(broken), str(folder / "bad.nequip.zip")]))

import nequip.utils.aot as aot
aot.aot_export_model = stop
unchanged("compile", lambda: deploy.main(["build", str(checkpoint), str(folder / "out.nequip.pt2")]), Stop)
type(adapter_for_file(checkpoint)).load_export = stop
unchanged("a command that stops", lambda: cli.main(["inspect", str(checkpoint)]), Stop)
print("FAILED" + "\\n".join(failed))
"""


@pytest.mark.slow
def test_calls(trained: Any, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "tests" / "helpers"), str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(trained.best), str(trained.folder / "test.xyz"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.split("FAILED")[1].strip() == ""
