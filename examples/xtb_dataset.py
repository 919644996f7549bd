"""A small reference set of trans-azobenzene (C12H10N2), labelled with GFN2-xTB.

    python examples/xtb_dataset.py --directory quickstart

It writes ``train.xyz`` and ``test.xyz``: frames of Langevin molecular dynamics at 500 K with ``REF_energy``
(eV) and ``REF_forces`` (eV/Å) in extended XYZ, the form ``mace_run_train`` and ``gaq`` read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.io import write
from ase.md.langevin import Langevin
from ase.neighborlist import natural_cutoffs, neighbor_list
from ase.optimize import BFGS

from gaq.progress import Progress

TEMPERATURE = 500.0  # K
TIMESTEP = 1.0  # fs; a C-H stretch takes 10 fs
FRICTION = 0.01  # 1/fs
STEPS_BETWEEN_FRAMES = 10
WARM_UP_FRAMES = 50  # discarded: five times 1 / FRICTION, so nothing of the start remains


def trans_azobenzene() -> Atoms:
    """Planar trans-azobenzene from ideal bond lengths (Å) and angles, inversion centre at the origin.

    Returns:
        The molecule, 24 atoms: N, then the ring with its hydrogens, then the inverted half.
    """
    nn, cn, cc, ch = 1.25, 1.42, 1.395, 1.085
    angle = np.deg2rad(114.5)  # N=N-C
    nitrogen = np.array([nn / 2, 0.0, 0.0])
    axis = np.array([-np.cos(angle), np.sin(angle), 0.0])  # from N through the ring
    side = np.array([-axis[1], axis[0], 0.0])
    centre = nitrogen + (cn + cc) * axis
    symbols, positions = ["N"], [nitrogen]
    for k in range(6):
        spoke = -np.cos(np.pi * k / 3) * axis + np.sin(np.pi * k / 3) * side
        symbols.append("C")
        positions.append(centre + cc * spoke)
        if k:  # the first carbon is bound to the nitrogen
            symbols.append("H")
            positions.append(centre + (cc + ch) * spoke)
    half = np.array(positions)
    return Atoms(symbols * 2, np.vstack([half, -half]))


def bonds(atoms: Atoms) -> set[tuple[int, int]]:
    """Pairs of atoms closer than 1.3 times the sum of their covalent radii."""
    first, second = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.3))
    return {(int(i), int(j)) for i, j in zip(first, second, strict=True) if i < j}


def draw_velocities(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Give ``atoms`` Maxwell-Boltzmann momenta at ``temperature`` (K), the centre of mass at rest."""
    masses = atoms.get_masses()[:, None]
    velocities = rng.standard_normal((len(atoms), 3)) * np.sqrt(units.kB * temperature / masses)
    velocities -= (masses * velocities).sum(axis=0) / masses.sum()
    atoms.set_velocities(velocities)


def xtb_calculator() -> Any:
    """The GFN2-xTB calculator of tblite.

    Raises:
        SystemExit: if tblite is not installed.
    """
    # One thread is fastest for 24 atoms. The OpenMP runtime reads this once, when tblite is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        from tblite.ase import TBLite
    except ImportError as error:
        raise SystemExit(
            f"The reference energies need tblite, which cannot be imported ({error}).\n"
            "Install it with:  pip install '.[examples]'"
        ) from error
    return TBLite(method="GFN2-xTB", verbosity=0)


def sample(
    start: Atoms, frames: int, rng: np.random.Generator, progress: Progress, warm_up: int = WARM_UP_FRAMES
) -> list[Atoms]:
    """Langevin dynamics from ``start``; one labelled frame every ``STEPS_BETWEEN_FRAMES`` steps.

    Args:
        start: a relaxed structure with its calculator.
        frames: how many frames to keep.
        rng: source of the velocities and of the thermostat's noise.
        progress: bar that advances by one for each frame, warm-up included.
        warm_up: frames discarded first.

    Returns:
        Frames with ``info["REF_energy"]`` (eV) and ``arrays["REF_forces"]`` (eV/Å), without calculator.

    Raises:
        RuntimeError: if a bond broke or formed.
    """
    atoms = start.copy()
    atoms.calc = start.calc
    draw_velocities(atoms, TEMPERATURE, rng)
    # fixcm=True would sample slightly wrong velocities; the labels do not depend on where the molecule is.
    dynamics = Langevin(
        atoms,
        TIMESTEP * units.fs,
        temperature_K=TEMPERATURE,
        friction=FRICTION / units.fs,
        fixcm=False,
        rng=rng,
    )
    kept = []
    for index in range(-warm_up, frames):
        dynamics.run(STEPS_BETWEEN_FRAMES)
        progress.advance()
        if index < 0:
            continue
        if bonds(atoms) != bonds(start):
            raise RuntimeError(
                f"A bond of the molecule broke or formed at {TEMPERATURE:g} K: use another seed, or lower TEMPERATURE."
            )
        frame = Atoms(atoms.symbols, atoms.positions - atoms.get_center_of_mass())
        frame.info["REF_energy"] = float(atoms.get_potential_energy())
        frame.arrays["REF_forces"] = atoms.get_forces()
        kept.append(frame)
    return kept


def make_dataset(
    directory: str | Path, train: int = 800, test: int = 100, seed: int = 0, warm_up: int = WARM_UP_FRAMES
) -> tuple[Path, Path]:
    """Make the training and test files.

    The two sets come from separate trajectories, so no test frame neighbours a training frame in time.

    Args:
        directory: where the files go; made if missing.
        train: number of training frames.
        test: number of test frames.
        seed: of the velocities and the thermostat; the same seed gives the same trajectory on one machine.
        warm_up: frames discarded at the start of each trajectory.

    Returns:
        Paths of ``train.xyz`` and ``test.xyz``.

    Raises:
        ValueError: if a number of frames is out of range.
    """
    if train < 1 or test < 1:
        raise ValueError(f"train and test must be at least 1 frame each, got train={train}, test={test}.")
    if warm_up < 0:
        raise ValueError(f"warm_up must be at least 0 frames, got {warm_up}.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    molecule = trans_azobenzene()
    molecule.calc = xtb_calculator()
    BFGS(molecule, logfile=None).run(fmax=0.01, steps=500)  # eV/Å

    paths = directory / "train.xyz", directory / "test.xyz"
    train_rng, test_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    total = train + test + 2 * warm_up
    with Progress(total, "GFN2-xTB dynamics", "frame") as progress:
        frames = tuple(
            sample(molecule, count, rng, progress, warm_up) for count, rng in ((train, train_rng), (test, test_rng))
        )
    # Written only when both are complete, so an interrupted run leaves no half set.
    for path, structures in zip(paths, frames, strict=True):
        write(path, structures, format="extxyz")
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Reference set of trans-azobenzene with GFN2-xTB.")
    parser.add_argument("--directory", type=Path, default=Path("quickstart"), help="where the files go")
    parser.add_argument("--train", type=int, default=800, help="number of training frames")
    parser.add_argument("--test", type=int, default=100, help="number of test frames")
    parser.add_argument(
        "--warm-up", type=int, default=WARM_UP_FRAMES, help="frames discarded at the start of each trajectory"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        paths = make_dataset(
            arguments.directory, arguments.train, arguments.test, arguments.seed, warm_up=arguments.warm_up
        )
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    print("wrote " + " and ".join(str(path) for path in paths))


if __name__ == "__main__":
    main()
