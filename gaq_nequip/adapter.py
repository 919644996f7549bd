"""NequIP and Allegro as the core sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import nequip
import torch
from torch import Tensor

from gaq.checks.potential import CalculatorPotential, Potential
from gaq.config.parse import QuantizationConfig
from gaq.deployed.form import Deployable
from gaq.model.elements import SpeciesMap
from gaq.model.state import feature_quantizers, state_of, unquantized
from gaq.model.summary_table import SummaryRow
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import WeightQuantizer
from gaq.untyped import Batch, Calculator, Document
from gaq_nequip import files, model, moments
from gaq_nequip.calculator import model_calculator
from gaq_nequip.engine.fused import refusals
from gaq_nequip.evaluate import NequIPPotential, energy_and_forces, make_batches
from gaq_nequip.example import from_structures
from gaq_nequip.forms import PACKAGE, SUFFIXES, form_of
from gaq_nequip.host import nequip_state
from gaq_nequip.names import EXAMPLE
from gaq_nequip.sites import class_name
from gaq_nequip.species import species_of
from gaq_nequip.summary import rows
from gaq_nequip.weights import weight_quantizers

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["NequIPAdapter"]


class NequIPAdapter:
    """The `gaq.adapter.Adapter` of NequIP and Allegro."""

    name = "nequip"

    def owns(self, model: torch.nn.Module) -> bool:
        return class_name(model) in ("GraphModel", "CompileGraphModel") or isinstance(model, files.CompiledModel)

    def owns_name(self, path: Path) -> bool:
        return path.name.endswith(SUFFIXES)

    def check_output(self, path: Path, source: Path) -> None:
        files.check_output(path, source)

    def process_state(self) -> AbstractContextManager[None]:
        return nequip_state()

    def load(self, path: str | Path, device: str = "cpu", species: SpeciesMap | None = None) -> torch.nn.Module:
        return files.load(path, device, species)

    def load_export(self, path: str | Path, device: str = "cpu", species: SpeciesMap | None = None) -> torch.nn.Module:
        return files.load(path, device, species)

    def save(self, model: torch.nn.Module, path: str | Path) -> None:
        files.save(model, path)

    def save_float(self, model: torch.nn.Module, path: str | Path) -> None:
        raise NotImplementedError("NequIP's files hold more than a model: float ones are written by NequIP itself.")

    def select(self, model: torch.nn.Module, elements: str | Iterable[str] | None, head: str | None) -> torch.nn.Module:
        raise ValueError(
            "elements and heads can be chosen in MACE models only: a NequIP or Allegro model has no heads, and holds "
            "no more than a row of its type embedding for each element."
        )

    def elements(self, model: torch.nn.Module, strict: bool = True) -> list[str]:
        return list(species_of(model, strict))

    def heads(self, model: torch.nn.Module) -> list[str]:
        return []

    def prepare(self, model_: torch.nn.Module, config: QuantizationConfig) -> torch.nn.Module:
        return model.prepare(model_, config)

    def convert(self, model_: torch.nn.Module) -> torch.nn.Module:
        return model.convert(model_)

    def in_float64(self, model_: torch.nn.Module) -> torch.nn.Module:
        return model_ if isinstance(model_, files.CompiledModel) else model.in_float64(model_)

    def config(self, model_: torch.nn.Module) -> QuantizationConfig | None:
        return model.config_of(model_)

    def status(self, model: torch.nn.Module) -> str:
        state = state_of(model)
        return "float" if state is None else state.status

    def notes(self, model: torch.nn.Module) -> Document:
        state = state_of(model)
        return {} if state is None else state.notes

    def rows(self, model_: torch.nn.Module) -> list[SummaryRow]:
        if isinstance(model_, files.CompiledModel):
            facts = {k: v for k, v in model_.metadata.items() if k.startswith("gaq") and k != "gaq_config"}
            status = ", ".join(f"{k.removeprefix('gaq_')} {v}" for k, v in sorted(facts.items())) or "float"
            weight_bytes = int(model_.metadata.get("gaq_weight_bytes", 0))
            return [SummaryRow("compiled model", "-", "-", "-", "-", weight_bytes, status)]
        return rows(model_)

    def weight_quantizers(self, model: torch.nn.Module) -> dict[str, WeightQuantizer]:
        return weight_quantizers(model)

    def feature_quantizers(self, model: torch.nn.Module) -> dict[str, FeatureQuantizer]:
        return feature_quantizers(model)

    def unquantized(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        return unquantized(model)

    def sizes(self, structures: Sequence[Atoms]) -> list[int]:
        return [len(structure) for structure in structures]

    def batches(self, model: torch.nn.Module, structures: Sequence[Atoms], atoms: int) -> list[Batch]:
        return make_batches(model, structures, atoms)

    def energy_and_forces(
        self, model: torch.nn.Module, batch: Batch, create_graph: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        return energy_and_forces(model, batch, create_graph)

    def input_moments(self, model: torch.nn.Module, batches: Iterable[Batch]) -> dict[str, list[Tensor | None]]:
        return moments.input_moments(model, batches)

    def file_kind(self, model: torch.nn.Module, path: str | Path) -> str:
        if isinstance(model, files.CompiledModel):
            return "compiled"
        if form_of(path) != PACKAGE:
            return "checkpoint"
        return "package" if self.status(model) in ("float", "frozen") else "package of float weights"

    def weight_bytes(self, model: torch.nn.Module, path: str | Path) -> int | None:
        if isinstance(model, files.CompiledModel):
            return model.constant_bytes
        return sum(row.bytes for row in self.rows(model)) or None

    def is_fused(self, model: torch.nn.Module) -> bool:
        return False  # only compiled files have the kernels, and there they cannot be switched off

    def unfused(self, model: torch.nn.Module) -> dict[str, str]:
        return {} if isinstance(model, files.CompiledModel) else refusals(model)

    def undeployable(self, model_: torch.nn.Module) -> str | None:
        return None  # known when the program is made, which takes longer than other commands have

    def accelerate(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    def reference_path(self) -> AbstractContextManager[None]:
        return nullcontext()

    def potential(self, model: torch.nn.Module, atoms: int | None = None, head: str | None = None) -> Potential:
        if isinstance(model, files.CompiledModel):
            return CalculatorPotential(model.calculator())
        return NequIPPotential(model, atoms)

    def fixed_at_deployment(self, model_: torch.nn.Module, charge: int | None, spin: int | None) -> dict[str, int]:
        for name, value in (("charge", charge), ("spin", spin)):
            if value is not None:
                raise ValueError(f"--{name} {value}: NequIP models do not read a {name}; leave it out.")
        return {}

    def hold(self, model_: torch.nn.Module, structures: Sequence[Atoms], values: Mapping[str, int]) -> list[Atoms]:
        return list(structures)

    def deployable(
        self,
        model_: torch.nn.Module,
        elements: Sequence[str],
        dtype: torch.dtype,
        values: Mapping[str, int] | None = None,
    ) -> Deployable:
        from gaq_nequip.engine.deployable import deployable

        return deployable(model_, elements, dtype)

    def keep_example(self, model: torch.nn.Module, structures: Sequence[Atoms]) -> None:
        model.__dict__[EXAMPLE] = from_structures(model, structures)

    def calculator(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "",
        species: SpeciesMap | None = None,
        head: str | None = None,
    ) -> Calculator:
        model = files.load(path, device, species)
        return model.calculator() if isinstance(model, files.CompiledModel) else model_calculator(model, device)

    def doctor(self) -> list[str]:
        """State of the training hook, for ``gaq doctor``."""
        from nequip.train.lightning import NequIPLightningModule

        active = getattr(NequIPLightningModule, "_gaq_patched", False)
        state = "active: nequip-train knows the key `quantization`" if active else "NOT active: reinstall gaq"
        return [f"nequip training  {state} (nequip {nequip.__version__})"]
