"""The interface of a framework adapter, and the search for the adapter of a model or file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gaq.caches import cached
from gaq.checks.potential import Potential
from gaq.config.parse import QuantizationConfig
from gaq.deployed.form import Deployable
from gaq.files.kinds import kind_of
from gaq.home import check_home
from gaq.model.elements import SpeciesMap
from gaq.model.summary_table import SummaryRow
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import WeightQuantizer
from gaq.untyped import Batch, Calculator, Document

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Adapter", "adapter_for", "adapter_for_file", "adapters", "missing_framework"]

GROUP = "gaq.adapters"
FRAMEWORKS = {"mace": "MACE", "nequip": "NequIP"}


class Adapter(Protocol):
    """A framework as the core sees it. Methods that change a model do so in place."""

    name: str

    def owns(self, model: torch.nn.Module) -> bool:
        """Whether a model is of this framework."""
        ...

    def owns_name(self, path: Path) -> bool:
        """Whether a file has the name of a model of this framework."""
        ...

    def check_output(self, path: Path, source: Path) -> None:
        """Refuse a name under which a quantized model made from a file cannot be written.

        Raises:
            ValueError: if the name does not end as this framework's files do, or a file of its form cannot be made
                from `source`.
        """
        ...

    def process_state(self) -> AbstractContextManager[None]:
        """Return a context with the process-wide state the framework computes in; leaving it restores the state."""
        ...

    def load(self, path: str | Path, device: str = "cpu", species: SpeciesMap | None = None) -> torch.nn.Module:
        """Load a model file.

        Args:
            path: the file.
            device: device to load it on.
            species: the model's name of the type of each chemical symbol, in frameworks that name types; None takes
                what the file says.
        """
        ...

    def load_export(self, path: str | Path, device: str = "cpu", species: SpeciesMap | None = None) -> torch.nn.Module:
        """As `load`; also reads the model in what the framework exported for other programs, to be inspected."""
        ...

    def save(self, model: torch.nn.Module, path: str | Path) -> None: ...

    def save_float(self, model: torch.nn.Module, path: str | Path) -> None:
        """Write a float model, as the framework's training does."""
        ...

    def select(self, model: torch.nn.Module, elements: str | Iterable[str] | None, head: str | None) -> torch.nn.Module:
        """Return a copy of a float model with only these elements and this head; None keeps all."""
        ...

    def elements(self, model: torch.nn.Module, strict: bool = True) -> list[str]:
        """Return the chemical symbols that a model knows.

        Args:
            model: a model.
            strict: whether types of which nobody says which elements they are raise a `ValueError`; else they are left
                out.
        """
        ...

    def heads(self, model: torch.nn.Module) -> list[str]:
        """Return the names of a model's heads; empty for a framework without heads."""
        ...

    def prepare(self, model: torch.nn.Module, config: QuantizationConfig) -> torch.nn.Module: ...

    def convert(self, model: torch.nn.Module) -> torch.nn.Module: ...

    def in_float64(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return a copy that computes in float64."""
        ...

    def config(self, model: torch.nn.Module) -> QuantizationConfig | None:
        """Return the configuration of a quantized model, None for a float one."""
        ...

    def status(self, model: torch.nn.Module) -> str:
        """Return ``float``, ``training`` or ``converted``."""
        ...

    def notes(self, model: torch.nn.Module) -> Document:
        """Return the plain data stored with a quantized model; callers may add to it."""
        ...

    def rows(self, model: torch.nn.Module) -> list[SummaryRow]: ...

    def weight_quantizers(self, model: torch.nn.Module) -> dict[str, WeightQuantizer]: ...

    def feature_quantizers(self, model: torch.nn.Module) -> dict[str, FeatureQuantizer]: ...

    def unquantized(self, model: torch.nn.Module) -> AbstractContextManager[None]: ...

    def sizes(self, structures: Sequence[Atoms]) -> list[int]:
        """Return the number of atoms of each structure."""
        ...

    def batches(self, model: torch.nn.Module, structures: Sequence[Atoms], atoms: int) -> list[Batch]:
        """Return the graphs of structures, in batches of at most so many atoms (see `gaq.training.sampling`)."""
        ...

    def energy_and_forces(
        self, model: torch.nn.Module, batch: Batch, create_graph: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return energies (graphs,) in eV, forces (atoms, 3) in eV/Å and the atoms of each graph (graphs,)."""
        ...

    def input_moments(self, model: torch.nn.Module, batches: Iterable[Batch]) -> dict[str, list[Tensor | None]]:
        """Return the matrix ``sum x x^T`` of the inputs of each block, by parameter name; None where there is none.

        Changes of the inputs with the positions count as inputs too (`gaq.model.moments`).
        """
        ...

    def file_kind(self, model: torch.nn.Module, path: str | Path) -> str:
        """Return the kind of a file, one of `gaq.reporting.gates.FILE_KINDS`."""
        ...

    def weight_bytes(self, model: torch.nn.Module, path: str | Path) -> int | None:
        """Bytes of the weights as they are used: codes and scales, float weights, or a compiled file's constants."""
        ...

    def is_fused(self, model: torch.nn.Module) -> bool:
        """Whether a model runs through fused kernels that `reference_path` switches off."""
        ...

    def unfused(self, model: torch.nn.Module) -> dict[str, str]:
        """Return why parts of a converted model keep the framework's own, slower operations, by the part's name.

        Empty where the fused kernels serve the model. Nothing is run, and the model is not changed.
        """
        ...

    def undeployable(self, model: torch.nn.Module) -> str | None:
        """Return why `gaq deploy` refuses a converted model, as far as that is known at once; None where it may not."""
        ...

    def accelerate(self, model: torch.nn.Module) -> torch.nn.Module:
        """Let a float model run through fused kernels where they serve it, in place; elsewhere it stays as it is."""
        ...

    def reference_path(self) -> AbstractContextManager[None]:
        """Return a context in which models run through plain operations."""
        ...

    def potential(self, model: torch.nn.Module, atoms: int | None = None, head: str | None = None) -> Potential:
        """Return a model as a potential, evaluated in batches of at most so many atoms; None leaves it the choice.

        Of a model with several heads, `head` is evaluated, or the one that the framework takes by default.
        """
        ...

    def fixed_at_deployment(self, model: torch.nn.Module, charge: int | None, spin: int | None) -> dict[str, int]:
        """Return charge and spin that a deployed file has fixed, as far as the model reads them: 0 and 1 for None.

        Raises:
            ValueError: if the model does not read what is given, or reads what a file cannot have fixed.
        """
        ...

    def hold(self, model: torch.nn.Module, structures: Sequence[Atoms], values: Mapping[str, int]) -> list[Atoms]:
        """Return copies of structures that hold a charge and a spin where the framework reads them."""
        ...

    def deployable(
        self,
        model: torch.nn.Module,
        elements: Sequence[str],
        dtype: torch.dtype,
        values: Mapping[str, int] | None = None,
    ) -> Deployable:
        """Return a model, float or converted, as what a deployed file holds.

        Args:
            model: on the CPU; it is not changed.
            elements: chemical symbols that the file is to know.
            dtype: in which it computes.
            values: charge and spin that the file has fixed; see `fixed_at_deployment`.

        Raises:
            ValueError: if the model has parts that no deployed file can hold; the message says which, and what to do.
        """
        ...

    def keep_example(self, model: torch.nn.Module, structures: Sequence[Atoms]) -> None:
        """Keep one of the structures with the model, in frameworks whose files need one."""
        ...

    def calculator(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "",
        species: SpeciesMap | None = None,
        head: str | None = None,
    ) -> Calculator:
        """Return the framework's ASE calculator of a file, for one of its heads if it has several.

        See `load` for `species`.
        """
        ...


@cached(most=1)
def adapters() -> dict[str, Adapter]:
    """Return the adapters whose framework is installed, by name.

    Raises:
        OSError: for a user without a home, which ASE and MACE need.
    """
    installed: dict[str, Adapter] = {}
    check_home()
    for entry in entry_points(group=GROUP):
        try:
            installed[entry.name] = entry.load()()
        except ModuleNotFoundError as error:
            # A missing framework is no error: its extra is not installed. A missing module of ours is one.
            if error.name is None or error.name.split(".")[0].startswith("gaq"):
                raise
    return installed


def _installed() -> str:
    """Names of the installed adapters, for messages."""
    return ", ".join(adapters()) or "none (install gaq[mace] or gaq[nequip])"


def adapter_for(model: torch.nn.Module) -> Adapter:
    """Return the adapter of a model.

    Raises:
        TypeError: if no installed adapter knows the model.
    """
    for adapter in adapters().values():
        if adapter.owns(model):
            return adapter
    raise TypeError(
        f"{type(model).__module__}.{type(model).__name__} is not a model of a known framework; adapters installed: "
        f"{_installed()}."
    )


def adapter_for_file(path: str | Path) -> Adapter:
    """Return the adapter of a model file, by its content; its name counts where the content does not tell.

    Raises:
        ValueError: if the file is missing, or no installed adapter reads it; the message says what the file is.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind.framework in adapters():
        return adapters()[kind.framework]
    if kind.framework is not None:
        raise ValueError(f"{path}: {kind.words}. {missing_framework(kind.framework)}")
    for adapter in adapters().values():
        if adapter.owns_name(path):  # damaged: the adapter says how
            return adapter
    raise ValueError(
        f"{path}: {kind.words}. Models are MACE's .model and .safetensors and NequIP's .ckpt, .nequip.zip and "
        f".nequip.pt2; adapters installed: {_installed()}."
    )


def missing_framework(name: str) -> str:
    """The sentence that says how to install a framework that is not here.

    Args:
        name: ``mace`` or ``nequip``.
    """
    return (
        f"{FRAMEWORKS[name]} is not installed here: pip install 'gaq[{name}]' (MACE and NequIP need separate "
        "environments)."
    )
