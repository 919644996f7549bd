"""The Python interface: load, select, prepare, calibrate, convert, save, summary, report, sensitivity."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from gaq.adapter import adapter_for, adapter_for_file
from gaq.checks.labels import ENERGY_KEY, FORCES_KEY
from gaq.checks.structures import check_structures, without_single_atoms
from gaq.config.effect import training_only_note
from gaq.config.parse import ConfigSpec, parse_config
from gaq.model.elements import SpeciesMap, check_calibration, check_known
from gaq.model.state import require_state
from gaq.model.summary_table import format_rows
from gaq.training import ptq
from gaq.training.sampling import choose
from gaq.untyped import Document, Options

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["calibrate", "convert", "load", "prepare", "quantize", "report", "save", "select", "sensitivity", "summary"]

logger = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _in_process_state(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Call a function in the process-wide state that the framework of its first argument needs, and restore it."""
    name = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        subject: Any = args[0] if args else kwargs[name]  # of the types that the functions below declare
        adapter = adapter_for(subject) if isinstance(subject, torch.nn.Module) else adapter_for_file(subject)
        with adapter.process_state():
            return function(*args, **kwargs)

    return call


@_in_process_state
def load(path: str | Path, device: str = "cpu", species: SpeciesMap | None = None) -> torch.nn.Module:
    """Load a model, float or quantized; the adapter of its framework says what it raises.

    Args:
        path: the file.
        device: device to load it on.
        species: for NequIP and Allegro, the name of the model's type for each chemical symbol, where the names are not
            symbols and the file does not say which elements they are.
    """
    return adapter_for_file(path).load(path, device, species)


@_in_process_state
def save(model: torch.nn.Module, path: str | Path) -> None:
    """Write a quantized model in packed form; the form ``*.safetensors`` runs no code when loaded."""
    adapter_for(model).save(model, path)


@_in_process_state
def select(
    model: torch.nn.Module, elements: str | Iterable[str] | None = None, head: str | None = None
) -> torch.nn.Module:
    """Return a copy of a float model with some of its elements, one of its heads, or both.

    Energies and forces of structures of these elements, in this head, stay the same.

    Args:
        model: a float model.
        elements: chemical symbols, or one text such as ``"Li,P,S,Cl"``; None keeps all.
        head: the head to keep, in a model with several; None keeps all.

    Raises:
        ValueError: for symbols that are unknown, unknown to the model or named twice, a head that the model does not
            have, and models that cannot be cut; the message says what is allowed.
    """
    return adapter_for(model).select(model, elements, head)


@_in_process_state
def prepare(model: torch.nn.Module, config: ConfigSpec = "gaq") -> torch.nn.Module:
    """Insert quantizers into a float model, in place.

    Args:
        model: a model of a known framework.
        config: preset name, mapping, or `gaq.QuantizationConfig`.

    Returns:
        The same model, ready for training or for `calibrate`.

    Raises:
        gaq.ConfigError: for a configuration that cannot be used.
        TypeError: for a model of no known framework.
    """
    return adapter_for(model).prepare(model, parse_config(config))


@_in_process_state
def calibrate(model: torch.nn.Module, structures: Sequence[Atoms], progress: bool = True) -> torch.nn.Module:
    """Quantize a prepared model after training, in place and without reference labels.

    The steps are rounding calibrated layer by layer, self-distillation against the float model's forces, and activation
    ranges from a sample of the structures (see `gaq.training.ptq`).

    Args:
        model: a prepared model, not converted.
        structures: structures like those the model will be used on; at least one of several atoms. Those of a single
            atom are left out, and where all are at rest their atoms are displaced; a line in the log says so.
        progress: whether to show progress bars.

    Returns:
        The same model.

    Raises:
        ValueError: if the model is not prepared, there are no structures of several atoms, no atoms of them interact,
            one has an element that the model does not know, two atoms at one place, or positions that are not finite.
    """
    adapter = adapter_for(model)
    config = adapter.config(model)
    if config is None:
        raise ValueError("this model is not quantized: call gaq.prepare(model, 'gaq') first.")
    if adapter.status(model) != "training":
        raise ValueError("this model is converted: its rounding is final. Start again from the float model.")
    if not structures:
        raise ValueError("calibration needs at least one structure; the data given holds none.")
    check_structures(structures)
    check_known(adapter.elements(model), structures)
    structures, left_out = without_single_atoms(structures)
    for line in left_out:
        logger.warning(line)
    ptq.check_interacting(adapter, model, structures)
    structures = ptq.away_from_rest(adapter, model, structures, config.calibration.seed)
    sample = choose(structures, config.calibration.frames, config.calibration.seed)
    result = ptq.calibrate_weights(adapter, model, structures, config, progress)
    require_state(model).holds_scales = True
    if result is not None:
        logger.info(result.describe())
        adapter.notes(model)["distillation"] = {
            "force_rms_before_mev_per_angstrom": result.before,
            "force_rms_after_mev_per_angstrom": result.after,
            "force_rms_target_mev_per_angstrom": result.target,
            "steps": result.steps,
            "structures": result.structures,
        }
    ptq.observe_ranges(adapter, model, sample, progress=progress)
    adapter.keep_example(model, structures)
    return model


@_in_process_state
def sensitivity(
    model: torch.nn.Module, structures: Sequence[Atoms], config: ConfigSpec = "naive_w8a8", progress: bool = True
) -> list[ptq.Sensitivity]:
    """Round one weight tensor at a time and measure the force error, to find the tensors that deserve 16 bits.

    Args:
        model: a float model; it is not changed.
        structures: a few structures; labels are not needed.
        config: how to round; the default gives every tensor the same 8 bits.
        progress: whether to show a progress bar.

    Returns:
        One entry per tensor, the largest error first. Put those that deserve 16 bits under ``overrides``, as
        ``{"products.*.symmetric_contractions": {"weights": {"bits": 16}}}``.

    Raises:
        ValueError: if no atoms of the structures interact, and as `prepare`.
    """
    ptq.check_interacting(adapter_for(model), model, structures)
    prepared = prepare(copy.deepcopy(model), config)
    return ptq.sensitivity_scan(adapter_for(prepared), prepared, structures, progress=progress)


@_in_process_state
def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Round the weights for good, in place. The model then equals what its file will hold.

    Raises:
        ValueError: if the model is not prepared, or rounds activations whose ranges were never observed.
    """
    adapter = adapter_for(model)
    for name, quantizer in adapter.feature_quantizers(model).items():
        if quantizer.needs_ranges and not bool(quantizer.observed.any()):
            raise ValueError(
                f"the input range of {name} was never observed: call gaq.calibrate(model, structures) or train first."
            )
    return adapter.convert(model)


@_in_process_state
def quantize(
    model: torch.nn.Module,
    structures: Sequence[Atoms],
    config: ConfigSpec = "gaq",
    progress: bool = True,
    *,
    elements: str | Iterable[str] | None = None,
    head: str | None = None,
) -> torch.nn.Module:
    """Prepare, calibrate and convert a copy of the model; the original does not change.

    Args:
        model: a float model.
        structures: structures like those the model will be used on.
        config: preset name, mapping, or `gaq.QuantizationConfig`.
        progress: whether to show progress bars.
        elements: see `select`; the structures have to hold these elements and no others.
        head: see `select`.

    Raises:
        ValueError: as `select`, `prepare` and `calibrate`; and for structures of other elements than those chosen.
    """
    check_structures(structures)
    config = parse_config(config)
    if (note := training_only_note(config)) is not None:
        logger.warning(note)
    if elements is None and head is None:
        check_known(adapter_for(model).elements(model), structures)
        quantized = prepare(copy.deepcopy(model), config)
    else:
        quantized = select(model, elements, head)
        if elements is not None:
            check_calibration(adapter_for(quantized).elements(quantized), structures)
        quantized = prepare(quantized, config)
    return convert(calibrate(quantized, structures, progress))


@_in_process_state
def summary(model: torch.nn.Module) -> str:
    """Return a table with one row per module: irreps, bits, scales, bytes, and why a module stays float."""
    return format_rows(adapter_for(model).rows(model))


@_in_process_state
def report(
    path: str | Path,
    structures: Sequence[Atoms],
    reference: str | Path | None = None,
    nve_ps: float = 0.0,
    progress: bool = True,
    device: str = "cpu",
    trained: bool = False,
    gates_only: bool = False,
    species: SpeciesMap | None = None,
    head: str | None = None,
    energy_key: str = ENERGY_KEY,
    forces_key: str = FORCES_KEY,
    keep_partial: bool = False,
) -> Document:
    """Measure a model file: errors, equivariance, conservation, size, speed, and the gates of its preset.

    Args:
        path: the model, quantized or float; no gates apply to a float one.
        structures: structures, with labels (energies in eV, forces in eV/Å) on as many as there are.
        reference: the float model to compare with.
        nve_ps: length of a simulation without thermostat; 0 leaves it out.
        progress: whether to show progress bars.
        device: device to run on.
        trained: judge the model as trained with its rounding. Models trained with the key ``quantization`` say so
            themselves; those of a training loop of your own do not.
        gates_only: leave out what no gate judges: the time of a step, most of the reference's metrics.
        species: see `load`; of the model and the reference.
        head: of a model with several, measure this one; by default all are, one after the other.
        energy_key: key of the reference energy in ``info``.
        forces_key: key of the reference forces in ``arrays``.
        keep_partial: on Ctrl-C, return what was measured, with the line ``partial``, instead of raising.

    Returns:
        The report as plain data; see `gaq.reporting.measure_subject`.

    Raises:
        ValueError: as `gaq.reporting.measure.measure_file`.
    """
    from gaq.reporting import measure_file

    options: Options = {"nve_ps": nve_ps, "progress": progress, "gates_only": gates_only}
    options |= {"energy_key": energy_key, "forces_key": forces_key, "keep_partial": keep_partial}
    return measure_file(
        path, structures, reference, trained=trained, device=device, species=species, head=head, **options
    )
