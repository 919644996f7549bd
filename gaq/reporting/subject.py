"""A model file as the checks see it: potentials, calculator, kind, size, and comparisons with other paths."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gaq.checks.potential import CalculatorPotential, Potential
from gaq.model.elements import SpeciesMap, check_known
from gaq.model.state import TRAINED
from gaq.reporting.gates import FLOAT, NAIVE, quotient
from gaq.untyped import Calculator

if TYPE_CHECKING:
    from ase import Atoms

    from gaq.adapter import Adapter

__all__ = ["Subject", "open_file", "open_heads", "open_model"]


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
    head: str | None = None,
) -> Subject:
    """Open a model file, float or quantized, of any installed framework.

    Args:
        path: the file.
        device: device to run on.
        trained: whether the model was trained with its rounding; what the framework's command trained says so itself.
        through_calculator: take every number through the stock calculator, in the precision of the file.
        structures: structures it will be measured on, to refuse unknown elements at once.
        species: see `gaq.api.load`.
        head: of a model with several; by default the one that the framework takes.

    Raises:
        ValueError: for a file that is missing, damaged or of no known kind, a head that it does not have, and for
            structures with elements that the model does not know.
    """
    opened = _opened(path, device, trained, through_calculator, structures, species)
    _check_head(opened.adapter, opened.model, path, head)
    return opened.subject(head)


def open_heads(
    path: str | Path,
    device: str = "cpu",
    trained: bool = False,
    structures: Sequence[Atoms] = (),
    species: SpeciesMap | None = None,
    head: str | None = None,
) -> dict[str, Subject]:
    """Open a model file once, and return a subject for each of its heads; see `open_file`.

    Returns:
        Subjects by head, the only one being `head` where it is given; its name is empty in a framework without heads.
    """
    opened = _opened(path, device, trained, False, structures, species)
    _check_head(opened.adapter, opened.model, path, head)
    heads = opened.adapter.heads(opened.model)
    names = [head] if head is not None else heads or [""]
    return {name: opened.subject(name or None) for name in names}


def _check_head(adapter: Adapter, model: torch.nn.Module, path: str | Path, head: str | None) -> None:
    heads = adapter.heads(model)
    if head is not None and head not in heads:
        known = f"it has {', '.join(heads)}" if heads else "its framework knows no heads"
        raise ValueError(f"{path}: the model has no head {head!r}; {known}.")


@dataclass(frozen=True)
class _Opened:
    """A loaded file, of which subjects are made."""

    adapter: Adapter
    model: torch.nn.Module
    path: str | Path
    device: str
    trained: bool
    species: SpeciesMap | None
    calculator: Calculator | None

    @functools.cached_property
    def exact(self) -> torch.nn.Module:
        """The model in float64."""
        return self.adapter.in_float64(self.model)

    def subject(self, head: str | None) -> Subject:
        adapter, model = self.adapter, self.model
        config = adapter.config(model)
        calculator = self.calculator
        if calculator is not None:
            potential: Potential = CalculatorPotential(calculator)
            exact = potential
        else:
            potential, exact = (adapter.potential(m, head=head) for m in (model, self.exact))
        has_weights = next(model.parameters(), None) is not None
        return Subject(
            potential=potential,
            exact=exact,
            make_calculator=lambda: self.make_calculator(head) if calculator is None else calculator,
            path=str(self.path),
            preset=FLOAT if config is None else config.preset,
            training="qat" if config is not None and (self.trained or _was_trained(adapter, model)) else "ptq",
            rounds_features=config is not None and (config.rounds_activations or config.attention is not None),
            file_kind=adapter.file_kind(model, self.path),
            weight_bytes=adapter.weight_bytes(model, self.path),
            engine_error=_engine_error(adapter, model, head),
            naive=_naive(adapter, model, head) if config is None and has_weights else None,
        )

    def make_calculator(self, head: str | None) -> Calculator:
        """The stock calculator of the file, which loads it anew."""
        first = next(self.model.parameters(), None)
        # Passed on, because MACE's calculator warns if it has to find the dtype itself.
        dtype = "" if first is None else str(first.dtype).removeprefix("torch.")
        return self.adapter.calculator(self.path, self.device, dtype, self.species, head)


def _opened(
    path: str | Path,
    device: str,
    trained: bool,
    through_calculator: bool,
    structures: Sequence[Atoms],
    species: SpeciesMap | None,
) -> _Opened:
    from gaq.adapter import adapter_for_file

    adapter = adapter_for_file(path)
    model = adapter.load(path, device, species)
    if len(structures):
        check_known(adapter.elements(model), structures)
    if adapter.config(model) is None:
        model = adapter.accelerate(model)
    opened = _Opened(adapter, model, path, device, trained, species, None)
    return replace(opened, calculator=opened.make_calculator(None)) if through_calculator else opened


def _was_trained(adapter: Adapter, model: torch.nn.Module) -> bool:
    """Whether a model was trained with its rounding; files from before the note say so by their status."""
    return bool(adapter.notes(model).get(TRAINED)) or adapter.status(model) == "training"


def _engine_error(
    adapter: Adapter, model: torch.nn.Module, head: str | None
) -> Callable[[Sequence[Atoms]], float | None] | None:
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
            return np.concatenate(adapter.potential(model, head=head)(samples)[1]).astype(float)

        samples = _with_copies(structures, atoms=200)
        fused = forces(model)
        with adapter.reference_path():
            exact, plain = forces(adapter.in_float64(model)), forces(model)
        if not any(np.any(values) for values in (fused, plain, exact)):
            return None  # no force acts on any atom, so there is nothing to compare
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


def _naive(adapter: Adapter, model: torch.nn.Module, head: str | None) -> Callable[[Sequence[Atoms]], Potential]:
    """Make `Subject.naive`."""

    def make(structures: Sequence[Atoms]) -> Potential:
        from gaq.config.parse import parse_config
        from gaq.training.ptq import observe_ranges

        twin = adapter.prepare(copy.deepcopy(model), parse_config(NAIVE))
        observe_ranges(adapter, twin, structures)
        return adapter.potential(adapter.in_float64(adapter.convert(twin)), head=head)

    return make
