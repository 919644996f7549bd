"""Steps of a MACE model in other programs: as the stock float model, quantized, and as a deployed file.

    python benchmarks/hosts.py --model quickstart [--model FOLDER] [--host openmm] [--steps 20] [--rounds 5]

A folder has ``gaq.model``, the float model that it was made of or trained beside (``fp32.model`` or ``float.model``),
and ``gaq deploy gaq.model gaq.gaq``. The quickstart's models run on its molecule in a box, those of more elements on 64
atoms of silicon. Every program runs the three files by its own means, in turn, a few steps at a time, on one thread, in
processor time. Forces are compared with those of MACE's calculator on the same file and structure. Programs that are
not installed are left out; rows that an earlier run wrote for them stay.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.io import read, write
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from common import RESULTS, load_json, write_result
from mace.calculators import MACECalculator
from torch.nn.modules.module import register_module_forward_pre_hook

from gaq import ase as deployed
from gaq_mace.engine import Engine

CPU, FEMTOSECONDS = torch.device("cpu"), 0.5


class Run(NamedTuple):
    """A file in a program.

    Attributes:
        forces: (atoms, 3) in eV/Å, on the structure that the run was made with.
        steps: computes so many steps.
    """

    forces: Callable[[], np.ndarray]
    steps: Callable[[int], object]


def calculator_of(file: Path) -> Calculator:
    """ASE calculator of a file."""
    if file.suffix == ".gaq":
        return deployed.Calculator(file)
    return MACECalculator(model_paths=str(file), device="cpu", default_dtype="float32")


def with_ase(file: Path, atoms: Atoms) -> Run:
    """ASE's own dynamics."""
    moving = atoms.copy()
    moving.calc = calculator_of(file)
    MaxwellBoltzmannDistribution(moving, temperature_K=300, rng=np.random.default_rng(0))
    return Run(moving.get_forces, VelocityVerlet(moving, FEMTOSECONDS * units.fs).run)


def with_torch_sim(file: Path, atoms: Atoms) -> Run | None:
    """torch-sim's `MaceModel`, which takes models and no calculators."""
    import torch_sim
    from torch_sim.models.mace import MaceModel

    if file.suffix == ".gaq":
        return None
    loaded = torch.load(file, map_location="cpu", weights_only=False)
    model = MaceModel(model=loaded, device=CPU, dtype=torch.float32, compute_stress=False)
    settings: dict[str, Any] = {"integrator": torch_sim.Integrator.nve, "temperature": 300, "timestep": 0.0005}
    state = torch_sim.initialize_state(atoms, CPU, torch.float32)
    return Run(
        lambda: model(state)["forces"].numpy(),
        lambda number: torch_sim.integrate(system=atoms, model=model, n_steps=number, **settings),
    )


def with_openmm(file: Path, atoms: Atoms) -> Run:
    """OpenMM through OpenMM-ML: its MACE potential, or an ASE calculator."""
    import openmm
    from openmm import app, unit
    from openmmml import MLPotential

    topology = app.Topology()
    residue = topology.addResidue("ALL", topology.addChain())
    for symbol in atoms.symbols:
        topology.addAtom(symbol, app.Element.getBySymbol(symbol), residue)
    box = [openmm.Vec3(*vector) for vector in 0.1 * atoms.cell.array]
    topology.setPeriodicBoxVectors(box * unit.nanometer)
    if file.suffix == ".gaq":
        system = MLPotential("ase").createSystem(topology, calculator=deployed.Calculator(file))
    else:
        system = MLPotential("mace", modelPath=str(file)).createSystem(topology, precision="single")
    integrator = openmm.VerletIntegrator(FEMTOSECONDS * unit.femtoseconds)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPeriodicBoxVectors(*box)
    context.setPositions(0.1 * atoms.positions)
    context.setVelocitiesToTemperature(300, 0)

    def forces() -> np.ndarray:
        kilojoules = context.getState(forces=True).getForces(asNumpy=True)
        return kilojoules.value_in_unit(unit.kilojoule_per_mole / unit.angstrom) * units.kJ / units.mol

    return Run(forces, integrator.step)


DRIVER = """
from gaq.ase import Calculator
from ipi.pes._ase import ASEDriver

__DRIVER_NAME__, __DRIVER_CLASS__ = "gaq", "GAQDriver"


class GAQDriver(ASEDriver):
    def __init__(self, template, file, **options):
        self.file = file
        super().__init__(template, **options)

    def check_parameters(self):
        super().check_parameters()
        self.ase_calculator = Calculator(self.file)
"""


def with_ipi(file: Path, atoms: Atoms) -> Run:
    """i-PI with the force field in its own process: its MACE driver, or an ASE calculator."""
    from ipi.scripting import InteractiveSimulation, forcefield_xml, motion_nvt_xml, simulation_xml

    folder = Path(tempfile.mkdtemp(prefix="gaq-ipi-"))
    write(folder / "cell.xyz", atoms)
    files = {"template": str(folder / "cell.xyz"), "model": str(file)}
    force_field = forcefield_xml("gaq", pes="mace", parameters=files)
    if file.suffix == ".gaq":
        (folder / "driver.py").write_text(DRIVER)
        force_field = force_field.replace("'model'", "'file'").replace("model:", "file:")
        force_field = force_field.replace(
            "<pes>mace</pes>", f"<pes>custom</pes><pes_path>{folder / 'driver.py'}</pes_path>"
        )
    output = f"<output prefix='{folder}/md'><properties stride='1000' filename='out'>[ step ]</properties></output>"
    text = simulation_xml(atoms, force_field, motion_nvt_xml(FEMTOSECONDS * units.fs), 300 * units.kB, output)
    before = Path.cwd()
    os.chdir(folder)  # where i-PI writes its restart file
    simulation = InteractiveSimulation(text)
    os.chdir(before)

    def steps(number: int) -> None:
        os.chdir(folder)
        simulation.run(number)
        os.chdir(before)

    return Run(lambda: simulation.get_structures().get_forces(), steps)


def with_janus(file: Path, atoms: Atoms) -> Run:
    """janus-core's dynamics with its architecture ``mace``, or on atoms that have a calculator."""
    from janus_core.calculations.md import NVE
    from janus_core.calculations.single_point import SinglePoint

    choice: dict[str, Any] = {"struct": atoms.copy()}
    if file.suffix == ".gaq":
        choice["struct"].calc = deployed.Calculator(file)
    else:
        choice |= {"arch": "mace", "model": str(file), "calc_kwargs": {"default_dtype": "float32"}}
    single = SinglePoint(**choice, properties=["forces"])
    prefix = str(Path(tempfile.mkdtemp(prefix="gaq-janus-")) / "md")
    options = {"temp": 300, "timestep": FEMTOSECONDS, "file_prefix": prefix, "stats_every": 1000, "traj_every": 1000}
    return Run(
        lambda: single.run()["forces"],
        lambda number: NVE(struct=single.struct, steps=number, **options).run(),
    )


def phonons_of(crystal: Atoms, repeat: int) -> Any:  # a Phonopy, which is not installed everywhere
    """phonopy's object for a crystal and so many of its cells along each axis."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    scaled = crystal.get_scaled_positions()
    unit_cell = PhonopyAtoms(crystal.symbols, cell=crystal.cell.array, scaled_positions=scaled)
    return Phonopy(unit_cell, np.diag([repeat] * 3))


def forces_of_supercells(phonons: Any, calculator: Calculator) -> list[np.ndarray]:
    """Forces on the displaced supercells, each (atoms, 3) in eV/Å."""
    forces = []
    for cell in phonons.supercells_with_displacements:
        displaced = Atoms(cell.symbols, cell.positions, cell=cell.cell, pbc=True, calculator=calculator)
        forces.append(displaced.get_forces())
    return forces


def with_phonopy(file: Path, atoms: Atoms) -> Run | None:
    """phonopy's displaced supercells, one for a step; crystals only."""
    if len(set(atoms.numbers)) > 1:
        return None
    phonons = phonons_of(silicon(1), 2)
    calculator = calculator_of(file)

    def steps(number: int) -> None:
        phonons.generate_displacements(distance=0.03, number_of_snapshots=number, random_seed=0)
        forces_of_supercells(phonons, calculator)

    def forces() -> np.ndarray:
        copied = atoms.copy()
        copied.calc = calculator
        return copied.get_forces()

    return Run(forces, steps)


def frequency_differences(files: dict[str, Path]) -> dict[str, float]:
    """Largest difference of phonon frequencies of silicon to those of the same model in float64, in THz."""
    phonons = phonons_of(bulk("Si", "diamond", a=5.43), 3)
    phonons.generate_displacements(distance=0.01)

    def frequencies(calculator: Calculator) -> np.ndarray:
        phonons.forces = forces_of_supercells(phonons, calculator)
        phonons.produce_force_constants()
        phonons.run_mesh([8, 8, 8], is_gamma_center=True)
        return np.array(phonons.mesh.frequencies)

    exact = {
        name: frequencies(MACECalculator(model_paths=str(files[name]), device="cpu", default_dtype="float64"))
        for name in ("stock", "gaq")
    }
    exact["deployed"] = exact["gaq"]
    return {
        f"{name}_frequency_difference_thz": float(np.abs(frequencies(calculator_of(file)) - exact[name]).max())
        for name, file in files.items()
    }


HOSTS: dict[str, tuple[str, Callable[[Path, Atoms], Run | None]]] = {
    "ase": ("ase", with_ase),
    "torch-sim": ("torch-sim-atomistic", with_torch_sim),
    "openmm": ("openmmml", with_openmm),
    "i-pi": ("ipi", with_ipi),
    "janus-core": ("janus-core", with_janus),
    "phonopy": ("phonopy", with_phonopy),
}
"""Distribution and function of each program."""


def silicon(repeat: int) -> Atoms:
    """Cubic silicon, 8 atoms in a cell, repeated along each axis."""
    return bulk("Si", "diamond", a=5.43, cubic=True).repeat(repeat)


def structure_of(folder: Path) -> Atoms:
    """The quickstart's first test molecule in a box, or 64 atoms of silicon, each displaced by some 0.05 Å."""
    if (folder / "test.xyz").exists():
        read_atoms = read(folder / "test.xyz", 0)
        molecule = Atoms(read_atoms.symbols, read_atoms.positions, pbc=True)
        molecule.center(vacuum=6.0)
        return molecule
    crystal = silicon(2)
    crystal.rattle(0.05, seed=0)
    return crystal


def calls_of_kernels(run: Run, steps: int) -> int:
    """How many times the fused kernels are called in so many steps."""
    calls = 0

    def count(module: torch.nn.Module, _: object) -> None:
        nonlocal calls
        calls += isinstance(module, Engine)

    hook = register_module_forward_pre_hook(count)
    run.steps(steps)
    hook.remove()
    return calls


def measured(host: str, folder: Path, atoms: Atoms, steps: int, rounds: int) -> dict[str, Any] | None:
    """One row; None where the program does not take such a structure."""
    files = {name: folder / file for name, file in (("gaq", "gaq.model"), ("deployed", "gaq.gaq"))}
    files["stock"] = next(folder / name for name in ("fp32.model", "float.model") if (folder / name).exists())
    distribution, make = HOSTS[host]
    runs = {name: run for name, file in files.items() if (run := make(file, atoms)) is not None}
    if not runs:
        return None
    row: dict[str, Any] = {"host": host, "version": version(distribution), "python": platform.python_version()}
    row |= {"torch": torch.__version__, "model": folder.name, "atoms": len(atoms)}
    for name, run in runs.items():
        expected = atoms.copy()
        expected.calc = calculator_of(files["gaq" if name == "deployed" else name])
        difference = run.forces() - expected.get_forces()
        row[f"{name}_force_difference_mev_per_angstrom"] = float(1e3 * np.abs(difference).max())
    row["largest_force_mev_per_angstrom"] = float(1e3 * np.abs(expected.get_forces()).max())
    if host == "phonopy":
        row |= frequency_differences(files)
    row["kernel_calls_of_10_steps"] = calls_of_kernels(runs["gaq"], 10)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run.steps(steps)
            if number > 0:
                times[name].append((time.process_time() - start) / steps)
    for name, values in times.items():
        row[f"{name}_ms"] = 1e3 * float(np.median(values))
    for name in runs.keys() - {"stock"}:
        row[f"{name}_times_faster"] = float(np.median(np.array(times["stock"]) / np.array(times[name])))
    return row


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", required=True, help="a folder of models; repeatable")
    parser.add_argument("--host", choices=HOSTS, action="append", help="default: all that are installed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = load_json(RESULTS / "hosts.json").get("rows", [])
    for host in arguments.host or HOSTS:
        try:
            version(HOSTS[host][0])
        except PackageNotFoundError:
            print(f"{host}: not installed", file=sys.stderr)
            continue
        for folder in (path.resolve() for path in arguments.model):
            row = measured(host, folder, structure_of(folder), arguments.steps, arguments.rounds)
            if row is None:
                continue
            rows = [old for old in rows if (old["host"], old["model"]) != (host, folder.name)] + [row]
            for key, value in row.items():
                print(f"{key:45} {value:.3g}" if isinstance(value, float) else f"{key:45} {value}")
            print(flush=True)
    order = list(HOSTS)
    print(write_result("hosts", sorted(rows, key=lambda row: (order.index(row["host"]), row["atoms"]))))


if __name__ == "__main__":
    main()
