"""LAMMPS, and a plugin whose pair style runs a small potential instead of a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from gaq.lammps import build, simulation
from gaq.lammps.installation import Installation, LammpsError, find

KERNELS = Path(build.native.__file__).parent


@pytest.fixture(scope="session")
def lammps() -> Installation:
    """The LAMMPS of this environment."""
    try:
        return find()
    except LammpsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def plugin(lammps: Installation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair style with the potential of `exchanging_potential` behind it."""
    folder = tmp_path_factory.mktemp("plugin")
    for name in (*build.PAIR_FILES, build.ENTRY_POINT):
        shutil.copy(build.PAIR_STYLE / name, folder)
    shutil.copy(KERNELS / "potential.h", folder)
    shutil.copy(Path(__file__).with_name("exchanging_potential.cpp"), folder)
    output = build.compile_plugin(lammps, sorted(folder.glob("*.cpp")), folder, folder / build.PLUGIN)
    build.check_loads(lammps, output)
    return output


@pytest.fixture
def crystal() -> Atoms:
    """A triclinic cell shorter than two cutoffs, with no symmetry."""
    positions = np.random.default_rng(0).uniform(0, 4.5, (8, 3))
    return Atoms("H3C3O2", positions, cell=[[5, 0, 0], [0.8, 5.2, 0], [-0.4, 0.7, 4.8]], pbc=True)


@pytest.fixture
def refused(lammps: Installation, plugin: Path, tmp_path: Path, crystal: Atoms) -> Callable[..., str]:
    """``refused("pair_style gaq ...")``: LAMMPS's error, which must be one line, on one rank and on two."""

    def refusal(pair: str, **options: str) -> str:
        messages = []
        for ranks in (1, 2):
            with pytest.raises(LammpsError) as caught:
                simulation.evaluate(lammps, plugin, crystal, ["H", "C", "O"], pair, tmp_path, ranks=ranks, **options)
            messages.append(str(caught.value).split(": ", 1)[1])
        assert messages[0].split(" (")[0] == messages[1].split(" (")[0]
        assert messages[0].count("ERROR") == 1
        return messages[0]

    return refusal
