"""A deployed file on parts of space, which run in threads and exchange features, against the same file on the whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["on_parts"]


class _Part:
    """Atoms of a part with the ghosts that they need, and how these exchange rows."""

    def __init__(self, atoms: Any, own: list[int], symbols: list[str], r_max: float, shared: _Shared) -> None:
        import numpy as np
        import torch
        from ase.neighborlist import neighbor_list

        i, j, vectors, shifts = neighbor_list("ijDS", atoms, r_max)
        kept = np.isin(i, own)
        i, j, vectors, shifts = i[kept], j[kept], vectors[kept], shifts[kept]
        keys = [(int(b), *map(int, s)) for b, s in zip(j, shifts, strict=True)]
        ghosts = sorted({key for key in keys if any(key[1:]) or key[0] not in own})
        place = {(atom, 0, 0, 0): n for n, atom in enumerate(own)}
        place |= {key: len(own) + n for n, key in enumerate(ghosts)}
        self.local, self.shared, self.calls = len(own), shared, 0
        self.atoms = [*own, *(key[0] for key in ghosts)]
        self.types = torch.tensor([symbols.index(atoms.symbols[a]) for a in self.atoms], dtype=torch.int64)
        self.receiver = torch.tensor([place[int(a), 0, 0, 0] for a in i], dtype=torch.int64)
        self.sender = torch.tensor([place[key] for key in keys], dtype=torch.int64)
        self.vectors = torch.from_numpy(-vectors).contiguous()

    def exchange(self, back: bool, rows: Any) -> None:
        import torch

        self.calls += 1
        if not back:
            rows[self.local :] = 0
        sums = self.shared.sum(self.calls, self.atoms, rows)
        if back:
            rows[: self.local] = torch.stack([sums[a] for a in self.atoms[: self.local]]) if self.local else 0
        elif self.atoms:
            rows.copy_(torch.stack([sums[a] for a in self.atoms]))


class _Shared:
    """Sums over all parts of rows of atoms, for each exchange."""

    def __init__(self, parts: int) -> None:
        self.barrier, self.lock = threading.Barrier(parts, timeout=60), threading.Lock()
        self.values: dict[int, dict[int, Any]] = {}

    def sum(self, call: int, atoms: list[int], rows: Any) -> dict[int, Any]:
        with self.lock:
            sums = self.values.setdefault(call, {})
            for atom, row in zip(atoms, rows, strict=True):
                sums[atom] = sums.get(atom, 0) + row.clone()
        self.barrier.wait()
        return sums


def on_parts(path: Path, atoms: Any, parts: list[list[int]]) -> tuple[float, Any, list[int]]:
    """Energy and forces of a structure whose atoms are divided among parts, and how often each part exchanged."""
    import numpy as np

    from gaq.deployed.potential import Potential

    symbols = sorted(set(atoms.get_chemical_symbols()))
    potential = Potential(path, symbols)
    shared = _Shared(len(parts))
    made = [_Part(atoms, part, symbols, potential.r_max, shared) for part in parts]

    def run(part: _Part) -> tuple[Any, Any]:
        return potential(part.types, part.sender, part.receiver, part.vectors, part.local, part.exchange)

    energy, forces = 0.0, np.zeros((len(atoms), 3))
    with ThreadPoolExecutor(len(parts)) as pool:
        for part, (energies, gradient) in zip(made, list(pool.map(run, made)), strict=True):
            energy += float(energies.sum())
            owners = np.array(part.atoms, dtype=int)
            np.add.at(forces, owners[part.receiver.numpy()], -gradient.numpy())
            np.add.at(forces, owners[part.sender.numpy()], gradient.numpy())
    return energy, forces, [part.calls for part in made]
