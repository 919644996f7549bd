"""Making a deployed file of a model, and checking it against the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import gaq
from gaq.adapter import adapter_for_file
from gaq.ase import Calculator
from gaq.deployed import form
from gaq.deployed.check import Check, compare, default_tolerance, relative_tolerance, structures_for
from gaq.files.kinds import new_name
from gaq.files.whole import put
from gaq.model.elements import SpeciesMap, checked_elements
from gaq.reporting.page import json_types
from gaq.untyped import Document

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["DTYPES", "Deployed", "deploy", "words"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Deployed:
    """What came of a deployment.

    Attributes:
        checks: differences to the model for each head.
        allowed: force difference that is allowed, meV/Å.
        written: whether the file agrees with the model, and was written.
        sizes: bytes of the file by what they are.
        elements: chemical symbols that the file knows.
        fixed: charge and spin that the file has fixed, by their names.
    """

    checks: dict[str, Check]
    allowed: float
    written: bool
    sizes: dict[str, int]
    elements: list[str]
    fixed: dict[str, int]


def deploy(
    path: str | Path,
    output: str | Path,
    elements: str | Iterable[str] | None = None,
    dtype: str = "float32",
    structures: Sequence[Atoms] = (),
    tolerance: float | None = None,
    species: SpeciesMap | None = None,
    charge: int | None = None,
    spin: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Deployed:
    """Write a model as one file that C++ runs: `gaq.ase.Calculator`, and ``pair_style gaq`` of LAMMPS.

    The file is compared with the model's own calculator on structures of several sizes before it is written.

    Args:
        path: file of a model, quantized or float.
        output: file to write, ``*.gaq``.
        elements: chemical symbols that the file is to know, or one text such as ``"Li,P,S"``; None for all.
        dtype: in which the file computes, ``float32`` or ``float64``.
        structures: to compare on, beside those made here.
        tolerance: allowed force difference in meV/Å; None for that of the preset (`default_tolerance`).
        species: see `gaq.load`.
        charge: total charge of every structure that the file computes; None for 0 in models that read one.
        spin: their multiplicity; None for 1 in models that read one.
        say: takes what is being done.

    Raises:
        ValueError: for a model that cannot be deployed (saying which part and why), unknown elements, another suffix.
        gaq.kernels.cpu.native.CompilerError: where the kernels cannot be built.
    """
    path, output = Path(path), Path(output)
    new_name(output, (form.SUFFIX,))
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    adapter = adapter_for_file(path)
    with adapter.process_state():
        say(f"loading {path}")
        model = adapter.load(path, "cpu", species)
        known = adapter.elements(model)
        chosen = known if elements is None else checked_elements(elements, known)
        heads = adapter.heads(model) or ["default"]
        fixed = adapter.fixed_at_deployment(model, charge, spin)
        if fixed:
            say(f"fixed in the file: {words(fixed)}")
        say("writing the model as a program")
        deployable = adapter.deployable(model, chosen, DTYPES[dtype], fixed)
        config = adapter.config(model)
        metadata: Document = {
            "gaq": gaq.__version__,
            "framework": adapter.name,
            "made of": path.name,
            "preset": None if config is None else config.preset,
            "configuration": None if config is None else config.to_dict(),
            "notes": adapter.notes(model),
            "elements": chosen,
            "heads": heads,
            "r_max": deployable.r_max,
            "dtype": dtype,
            "fixed": fixed,
        }
        with tempfile.TemporaryDirectory(prefix="gaq-") as folder:
            trial = Path(folder) / output.name
            form.write(trial, deployable, {key: json_types(value) for key, value in metadata.items()})
            compared = adapter.hold(model, [*structures_for(chosen, deployable.r_max), *structures], fixed)
            checks = {}
            for head in heads:
                say(f"comparing it with the model on {len(compared)} structures" + f", head {head}" * (len(heads) > 1))
                name = head if len(heads) > 1 else None
                checks[head] = compare(
                    adapter.calculator(path, "cpu", dtype, species, name), Calculator(trial, head=name), compared, True
                )
            bound = default_tolerance(config) if tolerance is None else tolerance
            agrees = all(check.within(bound, relative_tolerance(config)) for check in checks.values())
            sizes = form.sizes_of(trial)
            if agrees:
                put(trial, output)
    return Deployed(checks, bound, agrees, sizes, chosen, fixed)


def words(fixed: Mapping[str, int]) -> str:
    """Charge and spin that are fixed, in words."""
    return ", ".join(f"{name} {value}" for name, value in fixed.items())
