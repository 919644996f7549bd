"""Neighbour lists that are kept over steps give what MACE's own would, and are not kept where that is not certain."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import all_changes
from ase.md.verlet import VelocityVerlet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mace.calculators import MACECalculator

from gaq.kernels.cpu import native
from gaq.settings import override
from gaq_mace import engine, neighbours

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")

STOCK = MACECalculator._atoms_to_batch.__wrapped__
SKIN = 0.5


@pytest.fixture(autouse=True)
def default_skin(setting: Callable[..., Any]) -> None:
    setting(skin=SKIN)


@pytest.fixture(scope="module")
def calculators(quantized: Callable[..., Any], float_model: Callable[..., Any]) -> Callable[..., MACECalculator]:
    """``calculators(dtype, preset, **options)``: a new calculator; without a preset of the float model."""

    def get(dtype: Any = torch.float32, preset: str | None = "gaq", **options: Any) -> MACECalculator:
        model = float_model("plain", dtype) if preset is None else quantized(preset, "plain", dtype)
        return MACECalculator(models=[model], device="cpu", default_dtype=str(dtype).removeprefix("torch."), **options)

    return get


@pytest.fixture(scope="module")
def shared(calculators: Callable[..., MACECalculator]) -> dict[Any, MACECalculator]:
    return {dtype: calculators(dtype) for dtype in (torch.float32, torch.float64)}


def assert_same(ours: Any, theirs: Any) -> None:
    """Two batches are equal in everything they hold."""
    assert type(ours) is type(theirs)
    assert ours.__dict__.keys() == theirs.__dict__.keys()
    for name, value in theirs.__dict__.items():
        own = ours.__dict__[name]
        assert type(own) is type(value), name
        if isinstance(value, torch.Tensor):
            assert (own.dtype, own.device, own.shape) == (value.dtype, value.device, value.shape), name
            assert own.is_contiguous() == value.is_contiguous(), name
            assert torch.equal(own, value), name
        else:
            assert own == value, name


def check(calculator: MACECalculator, atoms: Atoms) -> Any:
    """The calculator's batch, which is MACE's."""
    own = calculator._atoms_to_batch(atoms)
    assert_same(own, STOCK(calculator, atoms))
    return own


class Counter:
    """How often batches are made by MACE's own means."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        real = neighbours.atoms_to_batch

        def counted(calculator: Any, atoms: Any, stock: Any) -> Any:
            def counting(*args: Any) -> Any:
                self.calls += 1
                return stock(*args)

            return real(calculator, atoms, counting)

        monkeypatch.setattr(neighbours, "atoms_to_batch", counted)

    def by_stock(self, calculator: MACECalculator, atoms: Atoms) -> bool:
        """Whether MACE made this batch, which is right in any case."""
        before = self.calls
        check(calculator, atoms)
        return self.calls > before


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def start(calculator: MACECalculator, atoms: Atoms) -> None:
    """Two steps, after which a list is kept."""
    for _ in range(2):
        check(calculator, atoms)
        atoms.positions[0, 0] += 1e-3
    kept = neighbours.kept_by(calculator)
    assert kept is not None
    assert kept._pairs is not None


PERIODIC = ((True, True, True), (False, False, False), (True, False, True), (False, True, False), (True, True, False))


@st.composite
def structures(draw: st.DrawFn) -> Atoms:
    """Molecules, dense and empty cells, some far smaller than the cutoff, skewed, with atoms outside of the cell."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 12))
    size = draw(st.sampled_from((1.7, 3.0, 6.0, 9.0, 40.0)))
    pbc = draw(st.sampled_from(PERIODIC))
    cell = np.diag(rng.uniform(0.8, 1.5, 3)) * size
    skew = draw(st.sampled_from((0.0, 0.0, 0.3, 0.9, 3.0)))
    cell = cell + skew * size * rng.normal(size=(3, 3)) * (1 - np.eye(3)) * (0.5 if skew < 3 else 1.0)
    # What is nearly flat has too many images for a test.
    if abs(np.linalg.det(cell)) < 1e-3 or 1 / np.linalg.norm(np.linalg.inv(cell), axis=0).max() < 1.3:
        cell = np.diag(np.diag(cell))
    places = rng.uniform(-0.3, 1.3, (count, 3)) if draw(st.booleans()) else rng.uniform(0, 1, (count, 3))
    atoms = Atoms(rng.choice([1, 6, 8], count), positions=places @ cell, cell=cell, pbc=pbc)
    if not any(pbc) and draw(st.booleans()):
        atoms.cell[:] = 0.0
    if draw(st.booleans()):
        # On the borders of cells and bins.
        atoms.positions[0] = 0.0
        atoms.positions[-1] = 0.5 * atoms.cell.sum(axis=0)
    return atoms


def check_steps(calculator: MACECalculator, atoms: Atoms, seed: int) -> None:
    """Check the batches after steps short and long."""
    rng = np.random.default_rng(seed)
    kept = 0
    for scale in (0.0, 1e-3, *rng.choice([0.0, 1e-3, 0.03, 0.1, 0.3, 3.0], 10, p=[0.1, 0.2, 0.3, 0.2, 0.1, 0.1])):
        atoms.positions += rng.normal(scale=scale, size=atoms.positions.shape)
        check(calculator, atoms)
        memory = neighbours.kept_by(calculator)
        assert memory is not None
        assert not memory._refused
        kept += memory._pairs is not None
    assert kept >= 1


every_structure = given(
    atoms=structures(), seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from((torch.float32, torch.float64))
)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@every_structure
def test_batches_are_those_of_mace(
    shared: dict[Any, MACECalculator], atoms: Atoms, seed: int, dtype: torch.dtype
) -> None:
    """However the cell is shaped and whatever of it is periodic."""
    check_steps(shared[dtype], atoms, seed)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@every_structure
def test_batches_of_many_structures_are_those_of_mace(
    shared: dict[Any, MACECalculator], atoms: Atoms, seed: int, dtype: torch.dtype
) -> None:
    check_steps(shared[dtype], atoms, seed)


def test_atoms_beyond_their_bins_are_left_to_mace(shared: dict[Any, MACECalculator]) -> None:
    """Where a cell is so skewed that matscipy counts shifts in a direction that is not periodic."""
    atoms = Atoms("COH", positions=[[0, 0, 0], [0, 1, 20], [1, 0, -20]], pbc=(True, False, True))
    atoms.cell[:] = [[3, 0, 0], [0, 3, 0], [0, 80, 3]]
    for _ in range(5):
        check(shared[torch.float64], atoms)
        atoms.positions[1] += 0.02


def test_a_distance_equal_to_the_cutoff_is_left_to_mace(
    calculators: Callable[..., MACECalculator], counter: Counter
) -> None:
    calculator = calculators(torch.float64)
    atoms = Atoms("CO", positions=[[0.1, 0, 0], [3.95, 0.1, 0]])
    start(calculator, atoms)
    assert not counter.by_stock(calculator, atoms)
    atoms.positions[:] = [[0.1, 0, 0], [4.1, 0, 0]]
    assert counter.by_stock(calculator, atoms)
    kept = neighbours.kept_by(calculator)
    assert kept is not None
    made = kept.made
    atoms.positions[1, 0] -= 0.01
    assert not counter.by_stock(calculator, atoms)
    # The list has been kept all the while.
    assert kept.made == made == 1


CASES = {
    "ethanol": lambda: molecule("CH3CH2OH"),
    "diamond": lambda: bulk("C", "diamond", a=3.6),
    "slab": lambda: Atoms("CO", positions=[[0, 0, 0], [0.7, 0.7, 0.6]], cell=[2.5, 2.5, 9.0], pbc=(True, True, False)),
    "apart": lambda: Atoms("CO", positions=[[0, 0, 0], [0, 0, 30]]),
    "one atom": lambda: Atoms("C"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trajectories(calculators: Callable[..., MACECalculator], case: str, dtype: torch.dtype) -> None:
    """Energies, forces and stresses of each step are those of a calculator that keeps nothing."""
    calculator, fresh = calculators(dtype), calculators(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    atoms = CASES[case]()
    rng = np.random.default_rng(0)
    atoms.set_velocities(rng.normal(scale=0.02 / units.fs, size=atoms.positions.shape))
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, timestep=units.fs)
    for _ in range(25):
        dynamics.run(1)
        own = calculator.results
        with override(skin=0.0):
            fresh.calculate(atoms, ["energy"], all_changes)
        assert own.keys() == fresh.results.keys()
        for name, value in fresh.results.items():
            # Two copies of a model differ by this without our doing: products depend on where in memory weights lie.
            largest = max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(own[name], value, rtol=0, atol=tolerance * largest, err_msg=name)
    kept = neighbours.kept_by(calculator)
    assert kept is not None
    assert kept.made >= 1


def wrap(atoms: Atoms) -> None:
    atoms.wrap()


def swap(atoms: Atoms) -> None:
    atoms.numbers[:] = atoms.numbers[::-1]


def append(atoms: Atoms) -> None:
    atoms.append("H")
    atoms.positions[-1] = [1.0, 1.0, 1.0]


CHANGES: dict[str, Callable[[Atoms], Any]] = {
    "cell": lambda atoms: atoms.set_cell(atoms.cell * 1.0001),
    "pbc": lambda atoms: atoms.set_pbc((True, True, False)),
    "numbers": swap,
    "atoms": append,
    "info": lambda atoms: atoms.info.__setitem__("charge", 1.0),
    "weight": lambda atoms: atoms.info.__setitem__("config_weight", 2.0),
    "charges": lambda atoms: atoms.arrays["charges"].__iadd__(0.25),
    "wrap": wrap,
    "leap": lambda atoms: atoms.positions.__setitem__((0, 1), atoms.positions[0, 1] + 0.51 * SKIN),
    "infinite": lambda atoms: atoms.positions.__setitem__((0, 1), 1e9),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_else_changes_is_seen(calculators: Callable[..., MACECalculator], counter: Counter, change: str) -> None:
    """Also where arrays of the atoms are changed in place; then lists are kept again."""
    calculator = calculators(torch.float64)
    atoms = molecule("CH3CH2OH", vacuum=1.0)
    atoms.pbc = True
    atoms.positions[2] += 3 * atoms.cell[0]
    atoms.arrays["charges"] = np.linspace(-1.0, 1.0, len(atoms))
    start(calculator, atoms)
    assert not counter.by_stock(calculator, atoms)
    CHANGES[change](atoms)
    assert counter.by_stock(calculator, atoms)
    if change == "infinite":
        return
    atoms.positions[0, 0] += 1e-3
    check(calculator, atoms)
    atoms.positions[0, 0] += 1e-3
    assert not counter.by_stock(calculator, atoms)


def test_settings_of_the_calculator_are_seen(
    calculators: Callable[..., MACECalculator], counter: Counter, setting: Callable[..., Any]
) -> None:
    calculator = calculators(torch.float64)
    atoms = molecule("CH3CH2OH")
    start(calculator, atoms)
    assert not counter.by_stock(calculator, atoms)
    calculator.r_max = 3.0
    assert counter.by_stock(calculator, atoms)
    start(calculator, atoms)
    assert not counter.by_stock(calculator, atoms)
    calculator.default_dtype = "float32"
    assert counter.by_stock(calculator, atoms)
    start(calculator, atoms)
    calculator.info_keys["another"] = "another"
    assert counter.by_stock(calculator, atoms)
    start(calculator, atoms)
    setting(skin=0.7)
    assert counter.by_stock(calculator, atoms)


def test_not_a_number_is_left_to_mace(calculators: Callable[..., MACECalculator]) -> None:
    """It is wrong in the same way, and the next steps are right."""
    calculator = calculators()
    atoms = molecule("CH3CH2OH")
    start(calculator, atoms)
    broken = atoms.copy()
    broken.positions[0, 0] = np.nan
    outcomes = []
    for make in (lambda: STOCK(calculator, broken), lambda: calculator._atoms_to_batch(broken)):
        try:
            outcomes.append(int(make()["edge_index"].shape[1]))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
    for _ in range(3):
        check(calculator, atoms)


def test_lists_are_made_as_seldom_as_the_skin_allows(
    calculators: Callable[..., MACECalculator], counter: Counter
) -> None:
    calculator = calculators()
    atoms = molecule("CH3CH2OH")
    by_stock = []
    for _ in range(100):
        by_stock.append(counter.by_stock(calculator, atoms))
        atoms.positions[3, 2] += 0.0101
    # The first step, and the second, whose list is held against MACE's; the list of each 25 steps is ours.
    assert by_stock == [True, True] + [False] * 98
    kept = neighbours.kept_by(calculator)
    assert kept is not None
    assert kept.made == 4


def test_structures_that_do_not_follow_one_another_cost_no_lists(
    calculators: Callable[..., MACECalculator], counter: Counter
) -> None:
    calculator = calculators()
    rng = np.random.default_rng(0)
    atoms = molecule("CH3CH2OH")
    first = atoms.positions.copy()
    for _ in range(5):
        atoms.positions = first + rng.normal(scale=0.3, size=first.shape)
        assert counter.by_stock(calculator, atoms)
    kept = neighbours.kept_by(calculator)
    assert kept is not None
    assert kept.made == 0


def test_a_batch_belongs_to_whoever_gets_it(calculators: Callable[..., MACECalculator]) -> None:
    """MACE and others set requires_grad, and some write into cells: the next batch does not know."""
    calculator = calculators()
    atoms = bulk("C", "diamond", a=3.6)
    for _ in range(5):
        batch = check(calculator, atoms)
        for name, value in list(batch.__dict__.items()):
            if isinstance(value, torch.Tensor):
                if value.is_floating_point():
                    value.requires_grad_(True).detach().add_(1.0)
                else:
                    value.fill_(0)
            elif isinstance(value, dict):
                for entry in value.values():
                    if isinstance(entry, list):
                        entry.append(7)
                value.clear()
            elif isinstance(value, list):
                value.append(name)
        atoms.positions[0, 0] += 1e-3
    assert check(calculator, atoms)["positions"].requires_grad is False


def test_other_uses_of_the_calculator(calculators: Callable[..., MACECalculator]) -> None:
    """Hessians and descriptors, in the middle of a simulation."""
    calculator, fresh = calculators(torch.float64), calculators(torch.float64)
    atoms = molecule("CH3CH2OH")
    start(calculator, atoms)
    own = calculator.get_hessian(atoms), calculator.get_descriptors(atoms), calculator.get_hessian(atoms)
    with override(skin=0.0):
        expected = fresh.get_hessian(atoms), fresh.get_descriptors(atoms)
    for ours, theirs in zip(own, (*expected, expected[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * float(np.abs(theirs).max()))


def test_committees(quantized: Callable[..., Any], float_model: Callable[..., Any], counter: Counter) -> None:
    """All models have to be ours."""
    atoms = molecule("CH3CH2OH")
    ours = [quantized("gaq", "plain", torch.float64, seed=seed) for seed in (0, 1)]
    start(MACECalculator(models=ours, device="cpu", default_dtype="float64"), atoms)
    mixed = [ours[0], float_model("plain", torch.float64)]
    calculator = MACECalculator(models=mixed, device="cpu", default_dtype="float64")
    for _ in range(3):
        assert counter.by_stock(calculator, atoms)
    assert neighbours.kept_by(calculator) is None


@pytest.mark.parametrize("case", ["float", "compiled", "padded", "engine off", "no skin"])
def test_who_is_not_served(
    calculators: Callable[..., MACECalculator], counter: Counter, setting: Callable[..., Any], case: str
) -> None:
    options = {"pad_num_atoms": 12, "pad_num_edges": 128} if case == "padded" else {}
    calculator = calculators(preset=None if case == "float" else "gaq", **options)
    if case == "compiled":
        # What MACE says of itself; to compile would take a minute.
        calculator.use_compile = True
    if case == "engine off":
        setting(engine=False)
    if case == "no skin":
        setting(skin=0.0)
    atoms = molecule("CH3CH2OH")
    for _ in range(4):
        assert counter.by_stock(calculator, atoms)
        atoms.positions[0, 0] += 1e-3
    assert neighbours.kept_by(calculator) is None


def test_the_engine_may_be_switched_off_for_a_while(calculators: Callable[..., MACECalculator]) -> None:
    calculator = calculators()
    atoms = molecule("CH3CH2OH")
    start(calculator, atoms)
    with engine.disabled():
        check(calculator, atoms)
        assert neighbours.kept_by(calculator) is None
    start(calculator, atoms)


def test_another_mace_is_noticed(
    calculators: Callable[..., MACECalculator],
    counter: Counter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If MACE extended cells otherwise, every step would be its own."""
    calculator = calculators()
    atoms = molecule("CH3CH2OH")
    monkeypatch.setattr(neighbours, "_full_cell", lambda positions, *rest: 50.0 * np.eye(3))
    for _ in range(4):
        assert counter.by_stock(calculator, atoms)
        atoms.positions[0, 0] += 1e-3
    assert sum("neighbour lists are made anew" in record.message for record in caplog.records) == 1


def test_copies_and_pickles_keep_nothing(calculators: Callable[..., MACECalculator]) -> None:
    calculator = calculators()
    atoms = molecule("CH3CH2OH")
    start(calculator, atoms)
    assert not any("neighbours" in name or "gaq" in name for name in calculator.__dict__)
    for other in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        assert neighbours.kept_by(other) is None
        check(other, atoms)


def test_what_is_kept_goes_with_the_calculator(calculators: Callable[..., MACECalculator]) -> None:
    calculator = calculators()
    start(calculator, molecule("CH3CH2OH"))
    kept = weakref.ref(neighbours.kept_by(calculator))
    del calculator
    gc.collect()
    assert kept() is None


LATE = """
import torch
from mace.calculators import MACECalculator
assert not hasattr(MACECalculator._atoms_to_batch, "__wrapped__")
from gaq_mace.hook.patches import ensure_installed
ensure_installed()
assert MACECalculator._atoms_to_batch.__wrapped__.__module__ == "mace.calculators.mace"
assert MACECalculator._atoms_to_batch.__code__.co_filename.endswith("hook/patches.py")
print("ALL")
"""


@pytest.mark.slow
def test_a_calculator_that_was_imported_before(python: Callable[..., Any]) -> None:
    done = python(LATE, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.stdout.endswith("ALL\n"), done.stderr[-2000:]
