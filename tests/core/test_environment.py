"""What a report says about the machine, and the time of a step."""

from __future__ import annotations

import numpy as np
import pytest
from ase.calculators.morse import MorsePotential
from reports import cluster, morse

from gaq.reporting import hardware, versions
from gaq.reporting.cost import seconds_per_step


class TestEnvironment:
    def test_versions(self):
        installed = versions()
        assert installed["numpy"] == np.__version__
        assert installed["python"].startswith("3.")
        assert {"torch", "ase"} <= set(installed)

    def test_hardware(self):
        machine = hardware()
        assert set(machine) == {"cpu", "instructions", "cores", "torch_threads", "gpu"}
        assert machine["cpu"]
        assert machine["cores"] >= 1

    def test_seconds_per_step_defeats_the_cache(self):
        class Counting(MorsePotential):
            calls = 0

            def calculate(self, *arguments, **options):
                Counting.calls += 1
                super().calculate(*arguments, **options)

        atoms = cluster()
        before = atoms.positions.copy()
        assert 0 < seconds_per_step(Counting(epsilon=2.0, r0=2.21, rho0=4.0), atoms, repeats=5, warmup=2) < 1
        assert Counting.calls == 7
        np.testing.assert_array_equal(atoms.positions, before)
        with pytest.raises(ValueError, match="repeats"):
            seconds_per_step(morse(), atoms, repeats=0)
