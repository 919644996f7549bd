"""A model file as the checks see it: potentials, calculator, kind, size, and comparisons with other paths."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gaq.checks.potential import CalculatorPotential, Potential
from gaq.model.elements import SpeciesMap
from gaq.model.state import TRAINED
from gaq.reporting.gates import FLOAT, NAIVE, quotient
from gaq.untyped import Calculator

if TYPE_CHECKING:
    from ase import Atoms

    from gaq.adapter import Adapter

__all__ = ["Subject", "open_file", "open_model"]


@dataclass(frozen=True)
class Subject:
    """The model that is measured.

    Attributes:
        potential: the model in the precision of its file.
        exact: the model in float64 where possible: in float32, energy differences at 0.01 Å and the rotation error of a
            correct model are rounding noise.
        make_calculator: makes the stock ASE calculator of the file, which loads it anew; None without one.
        path: the file; None for a model in memory.
        preset: preset of a quantized model; `gaq.reporting.gates.FLOAT` for any other.
        training: ``"qat"`` for a model that was trained with its rounding, else ``"ptq"``.
        rounds_features: whether the model rounds features besides weights.
        file_kind: kind of the file, as its adapter names it.
        weight_bytes: bytes of codes, scales and float weights; None if the file does not tell.
        engine_error: given structures, returns the ratio of the fused kernels' error to the reference path's; None
            where the model does not run through fused kernels.
        naive: for a float model, given structures, makes its `gaq.reporting.gates.NAIVE` twin with ranges observed on
            them.
    """

    potential: Potential
    exact: Potential
    make_calculator: Callable[[], Calculator] | None = None
    path: str | None = None
    preset: str = FLOAT
    training: str = "ptq"
    rounds_features: bool = False
    file_kind: str | None = None
    weight_bytes: int | None = None
    engine_error: Callable[[Sequence[Atoms]], float | None] | None = None
    naive: Callable[[Sequence[Atoms]], Potential] | None = None

    @functools.cached_property
    def calculator(self) -> Calculator:
        """The stock ASE calculator of the file; None without one."""
        return None if self.make_calculator is None else self.make_calculator()

    @property
    def file_bytes(self) -> int | None:
        """Size of the file."""
        return None if self.path is None else Path(self.path).stat().st_size


def open_model(adapter: Adapter, model: torch.nn.Module) -> Subject:
    """Open a model in memory; the attributes that only a file has stay empty."""
    return Subject(adapter.potential(model), adapter.potential(adapter.in_float64(model)))


def open_file(
    path: str | Path,
    device: str = "cpu",
    trained: bool = False,
    through_calculator: bool = False,
    structures: Sequence[Atoms] = (),
    species: SpeciesMap | None = None,
) -> Subject:
    """Open a model file, float or quantized, of any installed framework.

    Args:
        path: the file.
        device: device to run on.
        trained: whether the model was trained with its rounding; what the framework's command trained says so itself.
        through_calculator: take every number through the stock calculator, in the precision of the file.
        structures: structures it will be measured on, to refuse unknown elements at once.
        species: see `gaq.api.load`.

    Raises:
        ValueError: for a file that is missing, damaged or of no known kind, and for structures with elements that the
            model does not know.
    """
    from gaq.adapter import adapter_for_file

    adapter = adapter_for_file(path)
    model = adapter.load(path, device, species)
    if len(structures):
        adapter.batches(model, structures, 1)
    config = adapter.config(model)
    first = next(model.parameters(), None)
    # Passed on, because MACE's calculator warns if it has to find the dtype itself.
    dtype = "" if first is None else str(first.dtype).removeprefix("torch.")
    is_float = config is None
    if is_float:
        model = adapter.accelerate(model)
    if through_calculator:
        calculator = adapter.calculator(path, device, dtype, species)
        potential: Potential = CalculatorPotential(calculator)
        exact = potential
    else:
        potential, exact = adapter.potential(model), adapter.potential(adapter.in_float64(model))

    def make_calculator() -> Calculator:
        return calculator if through_calculator else adapter.calculator(path, device, dtype, species)

    return Subject(
        potential=potential,
        exact=exact,
        make_calculator=make_calculator,
        path=str(path),
        preset=FLOAT if config is None else config.preset,
        training="qat" if not is_float and (trained or _was_trained(adapter, model)) else "ptq",
        rounds_features=config is not None and (config.rounds_activations or config.attention is not None),
        file_kind=adapter.file_kind(model, path),
        weight_bytes=sum(row.bytes for row in adapter.rows(model)) or None,
        engine_error=_engine_error(adapter, model),
        naive=_naive(adapter, model) if is_float and first is not None else None,
    )


def _was_trained(adapter: Adapter, model: torch.nn.Module) -> bool:
    """Whether a model was trained with its rounding; files from before the note say so by their status."""
    return bool(adapter.notes(model).get(TRAINED)) or adapter.status(model) == "training"


def _engine_error(adapter: Adapter, model: torch.nn.Module) -> Callable[[Sequence[Atoms]], float | None] | None:
    """Make `Subject.engine_error`; None in float64 too, where no more precise result exists.

    Both errors are relative to the same model in float64; errors relative to the unquantized model would measure the
    rounding instead of the arithmetic. A ratio of rounding errors needs many atoms, so copies of the structures with
    atoms moved by 0.01 Å are added.
    """
    first = next(model.parameters(), None)
    if first is None or first.dtype != torch.float32 or not adapter.is_fused(model):
        return None

    def measure(structures: Sequence[Atoms]) -> float | None:
        def forces(model: torch.nn.Module) -> np.ndarray:
            return np.concatenate(adapter.potential(model)(samples)[1]).astype(float)

        samples = _with_copies(structures, atoms=200)
        fused = forces(model)
        with adapter.reference_path():
            exact, plain = forces(adapter.in_float64(model)), forces(model)
        fused_error, plain_error = (float(np.sqrt(np.mean((values - exact) ** 2))) for values in (fused, plain))
        return quotient(fused_error, plain_error)

    return measure


def _with_copies(structures: Sequence[Atoms], atoms: int) -> list[Atoms]:
    """Return the structures, with slightly distorted copies added until they have so many atoms together."""
    samples = [structure.copy() for structure in structures]
    rng = np.random.default_rng(0)
    while sum(map(len, samples)) < atoms:
        for structure in structures:
            copied = structure.copy()
            copied.positions += 0.01 * rng.standard_normal(structure.positions.shape)
            samples.append(copied)
    return samples


def _naive(adapter: Adapter, model: torch.nn.Module) -> Callable[[Sequence[Atoms]], Potential]:
    """Make `Subject.naive`."""

    def make(structures: Sequence[Atoms]) -> Potential:
        from gaq.config.parse import parse_config
        from gaq.training.ptq import observe_ranges

        twin = adapter.prepare(copy.deepcopy(model), parse_config(NAIVE))
        observe_ranges(adapter, twin, structures)
        return adapter.potential(adapter.in_float64(adapter.convert(twin)))

    return make
