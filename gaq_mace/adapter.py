"""MACE as the core sees it: `MACEAdapter`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import mace  # noqa: F401  (before e3nn)
import torch
from mace.modules import models as mace_models
from torch import Tensor

from gaq.checks.potential import Potential
from gaq.config.parse import QuantizationConfig
from gaq.deployed.form import Deployable
from gaq.files.kinds import new_name
from gaq.files.whole import written_whole
from gaq.kernels.cpu import native
from gaq.model.elements import SpeciesMap
from gaq.model.state import feature_quantizers, state_of, unquantized
from gaq.model.summary_table import SummaryRow
from gaq.process import default_dtype, dtype_restored
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import WeightQuantizer
from gaq.untyped import Batch, Document
from gaq_mace import engine, files, moments
from gaq_mace import summary as inspection
from gaq_mace.elements import element_names, head_names, select
from gaq_mace.engine import serving
from gaq_mace.evaluate import MACEPotential, energy_and_forces, keys_of, make_batches
from gaq_mace.hook import status
from gaq_mace.model import convert, prepare
from gaq_mace.weights import weight_quantizers

if TYPE_CHECKING:
    from ase import Atoms
    from mace.calculators import MACECalculator

__all__ = ["MACEAdapter"]


class MACEAdapter:
    """See `gaq.adapter.Adapter`."""

    name = "mace"

    def owns(self, model: torch.nn.Module) -> bool:
        return isinstance(model, mace_models.MACE)

    def owns_name(self, path: Path) -> bool:
        return path.name.endswith(files.SUFFIXES)

    def check_output(self, path: Path, source: Path) -> None:
        new_name(path, files.SUFFIXES)

    def process_state(self) -> AbstractContextManager[None]:
        # MACE sets torch's default dtype and leaves it so.
        return dtype_restored()

    def load(self, path: str | Path, device: str = "cpu", species: SpeciesMap | None = None) -> torch.nn.Module:
        _refuse_species(species)
        return files.load(path, device)

    def load_export(self, path: str | Path, device: str = "cpu", species: SpeciesMap | None = None) -> torch.nn.Module:
        _refuse_species(species)
        return files.load(path, device, exports=True)

    def save(self, model: torch.nn.Module, path: str | Path) -> None:
        files.save(model, path)

    def save_float(self, model: torch.nn.Module, path: str | Path) -> None:
        with written_whole(Path(path)) as part:
            torch.save(model, part)

    def select(self, model: torch.nn.Module, elements: str | Iterable[str] | None, head: str | None) -> torch.nn.Module:
        return select(model, elements, head)

    def elements(self, model: torch.nn.Module, strict: bool = True) -> list[str]:
        return element_names(model)

    def heads(self, model: torch.nn.Module) -> list[str]:
        return head_names(model)

    def prepare(self, model: torch.nn.Module, config: QuantizationConfig) -> torch.nn.Module:
        return prepare(model, config)

    def convert(self, model: torch.nn.Module) -> torch.nn.Module:
        return convert(model)

    def in_float64(self, model: torch.nn.Module) -> torch.nn.Module:
        return copy.deepcopy(model).double()

    def config(self, model: torch.nn.Module) -> QuantizationConfig | None:
        state = state_of(model)
        return None if state is None else state.config

    def status(self, model: torch.nn.Module) -> str:
        state = state_of(model)
        return "float" if state is None else state.status

    def notes(self, model: torch.nn.Module) -> Document:
        state = state_of(model)
        return {} if state is None else state.notes

    def rows(self, model: torch.nn.Module) -> list[SummaryRow]:
        return inspection.rows(model)

    def weight_quantizers(self, model: torch.nn.Module) -> dict[str, WeightQuantizer]:
        return weight_quantizers(model)

    def feature_quantizers(self, model: torch.nn.Module) -> dict[str, FeatureQuantizer]:
        return feature_quantizers(model)

    def unquantized(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        return unquantized(model)

    def sizes(self, structures: Sequence[Atoms]) -> list[int]:
        return [len(structure) for structure in structures]

    def batches(self, model: torch.nn.Module, structures: Sequence[Atoms], atoms: int) -> list[Batch]:
        # Readouts mask the channels of the other heads, so calibration needs the batches of every head.
        return [batch for head in head_names(model) for batch in make_batches(model, structures, atoms, head)]

    def energy_and_forces(
        self, model: torch.nn.Module, batch: Batch, create_graph: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        return energy_and_forces(model, batch, create_graph)

    def input_moments(self, model: torch.nn.Module, batches: Iterable[Batch]) -> dict[str, list[Tensor | None]]:
        return moments.input_moments(model, batches)

    def file_kind(self, model: torch.nn.Module, path: str | Path) -> str:
        return "model"

    def weight_bytes(self, model: torch.nn.Module, path: str | Path) -> int | None:
        return sum(row.bytes for row in self.rows(model)) or None

    def is_fused(self, model: torch.nn.Module) -> bool:
        return engine.serves(model, {})

    def unfused(self, model: torch.nn.Module) -> dict[str, str]:
        if self.status(model) != "converted":
            return {}
        reason = serving.record_of(model, warn=False).reason
        return {} if reason is None else {"model": reason}

    def undeployable(self, model: torch.nn.Module) -> str | None:
        from gaq_mace.engine.deployable import settled

        if self.status(model) != "converted":
            return None
        record = serving.record_of(model, warn=False)
        if record.engine is None:
            return record.reason
        try:
            settled(model, {})
        except engine.Unsupported as error:
            return str(error)
        return record.engine.why_no_program

    def accelerate(self, model: torch.nn.Module) -> torch.nn.Module:
        if serving.switched_off():
            return model
        try:
            return engine.accelerate(model)
        except (engine.Unsupported, native.CompilerError):  # the reference path gives the same numbers
            return model

    def reference_path(self) -> AbstractContextManager[None]:
        return engine.disabled()

    def potential(self, model: torch.nn.Module, atoms: int | None = None, head: str | None = None) -> Potential:
        return MACEPotential(model, atoms, head)

    def fixed_at_deployment(self, model: torch.nn.Module, charge: int | None, spin: int | None) -> dict[str, int]:
        from gaq_mace.engine.deployable import settled

        with _deploying(model):
            return settled(model, {"charge": charge, "spin": spin})

    def hold(self, model: torch.nn.Module, structures: Sequence[Atoms], values: Mapping[str, int]) -> list[Atoms]:
        keys, held = keys_of(model).info_keys, []
        for structure in structures:
            held.append(structure.copy())
            held[-1].info |= {keys[f"total_{name}"]: value for name, value in values.items()}
        return held

    def deployable(
        self,
        model: torch.nn.Module,
        elements: Sequence[str],
        dtype: torch.dtype,
        values: Mapping[str, int] | None = None,
    ) -> Deployable:
        from gaq_mace.engine.deployable import deployable

        # MACE's calculator computes in a default dtype that is the model's.
        with _deploying(model), default_dtype(dtype):
            copied = copy.deepcopy(model).to(dtype)
            return deployable(copied, element_names(model), elements, head_names(model), values)

    def keep_example(self, model: torch.nn.Module, structures: Sequence[Atoms]) -> None:
        pass  # MACE's files hold the model alone

    def calculator(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "",
        species: SpeciesMap | None = None,
        head: str | None = None,
    ) -> MACECalculator:
        from gaq_mace.calculator import Calculator

        path = Path(path)
        options = {"device": device, "default_dtype": dtype, **({} if head is None else {"head": head})}
        if files.is_safetensors(path):
            calculator = Calculator(models=[files.load(path, device)], **options)
        else:
            calculator = Calculator(model_paths=str(path), **options)
        keys = keys_of(calculator.models[0])
        calculator.info_keys |= keys.info_keys
        calculator.arrays_keys |= keys.arrays_keys
        return calculator

    def doctor(self) -> list[str]:
        """State of the training hook, for ``gaq doctor``."""
        return [f"mace training    {status.describe()}"]


@contextmanager
def _deploying(model: torch.nn.Module) -> Iterator[None]:
    """Context in which a model is deployed; says of one that cannot be how it runs instead."""
    if not isinstance(model, mace_models.ScaleShiftMACE):
        raise ValueError(f"a {type(model).__name__} cannot be deployed: only models of class ScaleShiftMACE can.")
    try:
        yield
    except engine.Unsupported as error:
        raise ValueError(
            f"the model cannot be deployed: {error}. It runs through MACE's calculator, and in LAMMPS through "
            "ML-IAP (gaq_mace_create_lammps_model)."
        ) from error


def _refuse_species(species: SpeciesMap | None) -> None:
    if species is not None:
        raise ValueError("species: MACE models know elements by their atomic numbers; leave it out.")
