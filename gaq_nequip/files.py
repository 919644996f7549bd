"""Model files of NequIP: checkpoints, packages, and compiled models (for reports only).

A quantized checkpoint is an ordinary one whose model configuration has the key ``quantization``: where this package is
installed, the stock commands continue its training, package it and compile it. A quantized package holds the integer
codes and the classes that read them, so it needs only NequIP.
"""

from __future__ import annotations

import json
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor
from torch.package import OrderedImporter
from torch.package.importer import ObjMismatchError, ObjNotFoundError, sys_importer

from gaq.caches import WeakValueCache
from gaq.config.parse import parse_stored
from gaq.files.archive import deflate
from gaq.files.kinds import new_name
from gaq.files.whole import written_whole
from gaq.model.elements import SpeciesMap
from gaq.model.state import TRAINED, FixedWeight, ModelFileError, ModelState, check_format, state_of
from gaq.process import check_device
from gaq.untyped import AnyModule, Calculator, Document
from gaq_nequip.example import example_of
from gaq_nequip.forms import CHECKPOINT, COMPILED, PACKAGE, form_of, named
from gaq_nequip.host import loading
from gaq_nequip.model import graph_models, ranges_follow
from gaq_nequip.names import EXAMPLE, SOURCE, SPECIES
from gaq_nequip.species import check_given, in_metadata, species_in_file, species_of, type_names

if TYPE_CHECKING:
    from torch.package import Importer, PackageImporter

__all__ = ["CompiledModel", "check_output", "load", "save"]


class CompiledModel(torch.nn.Module):
    """A compiled ``.nequip.pt2``, for reports: it computes, but its modules and weights cannot be inspected.

    Args:
        path: compiled file.
        device: device that it was compiled for.
        species: type names by chemical symbol; None takes what the file says.
    """

    def __init__(self, path: Path, device: str, species: SpeciesMap | None = None) -> None:
        from gaq_nequip.deploy import artefact

        super().__init__()
        self.path = path
        self.device = device
        self.metadata = artefact.metadata(path)
        self.constant_bytes = artefact.sections(path).weights
        self.__dict__[SPECIES] = (
            in_metadata(self.metadata) if species is None else check_given(species, type_names(self))
        )
        if "gaq_config" in self.metadata:
            config = parse_stored(json.loads(self.metadata["gaq_config"]), finished=True)
            notes = {TRAINED: self.metadata.get("gaq_trained") == "1"}
            self.__dict__["gaq_state"] = ModelState(config, self.metadata.get("gaq_status", "frozen"), notes=notes)

    def calculator(self) -> Calculator:
        """NequIP's ASE calculator of the file."""
        from gaq_nequip.calculator import compiled_calculator

        with named(self.path) as link:
            return compiled_calculator(link, self.device, species_of(self))


def check_output(path: Path, source: Path) -> str:
    """Refuse a name under which a model from a file cannot be written; return the form it names.

    Raises:
        ValueError: saying what can be written.
    """
    if path.name.endswith(COMPILED):
        raise ValueError(
            f"{path}: a compiled file is made by nequip-deploy build MODEL {path.name}, where MODEL is a quantized "
            f"{CHECKPOINT} or {PACKAGE}."
        )
    form = new_name(path, (CHECKPOINT, PACKAGE))
    made_of = form_of(source)
    if made_of == COMPILED:
        raise ValueError(f"{source}: a compiled file cannot be changed; give the {CHECKPOINT} it was made from.")
    if form == CHECKPOINT and made_of != CHECKPOINT:
        raise ValueError(
            f"{path}: a checkpoint can only be made from a checkpoint, and this model came from {source.name}. Write a "
            f"{PACKAGE}."
        )
    return form


def _install_state(model: torch.nn.Module) -> None:
    """Replace the state of a packaged model, of the package's class, by one of the installed class; checks it again."""
    state: Any = model.__dict__.get("gaq_state")  # of the class `ModelState` in the package
    if state is not None and not isinstance(state, ModelState):
        config = parse_stored(state.config.to_dict(), finished=state.status != "training")
        weights = {n: FixedWeight(w.bits, w.granularity, w.group_size, w.scale) for n, w in state.weights.items()}
        model.__dict__["gaq_state"] = ModelState(config, state.status, weights, dict(state.notes))


# What torch, pickle and NequIP raise for a damaged file or a file of another kind.
_UNREADABLE = (
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    AttributeError,
    ImportError,
    TypeError,
    AssertionError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    yaml.YAMLError,
)


def _check_package(path: Path) -> None:
    """Refuse a package with a damaged entry."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged_entry = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise ModelFileError(f"{path}: truncated or damaged, or not a package ({error}).") from error
    if damaged_entry is not None:
        raise ModelFileError(f"{path}: damaged: the entry {damaged_entry} does not match its checksum.")


# An entry lives as long as a model from the file: the classes of the model hold their importer.
_importers: WeakValueCache[tuple[Path, int], PackageImporter] = WeakValueCache()


def _importer(path: Path) -> PackageImporter:
    """The importer of a package; one per file, because what one importer made cannot be saved with another."""
    from nequip.model.saved_models.package import _suppress_package_importer_exporter_warnings

    path = path.resolve()

    def make() -> PackageImporter:
        with _suppress_package_importer_exporter_warnings():
            return torch.package.PackageImporter(str(path))  # type: ignore[attr-defined]  # not exported in its stub

    return _importers.get((path, path.stat().st_mtime_ns), make)


def _load_package(path: Path) -> AnyModule:
    from nequip.model.saved_models.package import (
        _cpu_deserialize_always,
        _suppress_package_importer_exporter_warnings,
    )

    with _suppress_package_importer_exporter_warnings(), _cpu_deserialize_always():
        return _importer(path).load_pickle("model", "eager_model.pkl", map_location="cpu")


def _other_nequip(path: Path, error: str) -> str:
    """Error message for a checkpoint whose tensors are not those of the model that the installed NequIP builds."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    versions: dict[str, str] = checkpoint["hyper_parameters"]["info_dict"].get("versions", {})
    writer = ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown versions"
    details = " ".join(error.split("\n", 1)[-1].split())
    return (
        f"this checkpoint was written with {writer}, and the nequip installed here builds its model with other "
        f"tensors. {details} Install the versions that wrote it (pip install nequip=={versions.get('nequip', '...')})."
    )


def load(path: str | Path, device: str = "cpu", species: SpeciesMap | None = None) -> torch.nn.Module:
    """Load a NequIP model, float or quantized, from a checkpoint, a package or a compiled file.

    Checkpoints and packages are pickles: loading one runs the code in it.

    Args:
        path: the file.
        device: device to load it on.
        species: type names by chemical symbol, where the file does not say which elements its types are.

    Raises:
        ModelFileError: if the file is missing, damaged, of another kind, or written by a later version.
        ValueError: if the device is not available, or `species` names a type that the model does not have.
    """
    from nequip.model.saved_models.load_utils import load_saved_model
    from nequip.train.lightning import _SOLE_MODEL_KEY

    path = Path(path)
    check_device(device)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file.")
    kind = form_of(path)
    if kind == COMPILED:
        from gaq_nequip.deploy import artefact

        try:
            return CompiledModel(path, device, species)
        except artefact.ArtefactError as error:
            raise ModelFileError(str(error)) from error
    if kind == PACKAGE:
        _check_package(path)
    try:
        with loading(), ranges_follow(), named(path) as link:
            loaded = _load_package(path) if kind == PACKAGE else load_saved_model(str(link), model_key=None)
    except _UNREADABLE as error:
        if str(error).startswith("Error(s) in loading state_dict"):
            raise ModelFileError(f"{path}: {_other_nequip(path, str(error))}") from error
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelFileError(f"{path}: truncated, damaged, or not a NequIP model ({cause}).") from error
    models = graph_models(loaded)
    if list(models) != [_SOLE_MODEL_KEY]:
        raise ModelFileError(f"{path}: holds {len(models)} models ({', '.join(models)}); only single ones can be read.")
    model = models[_SOLE_MODEL_KEY]
    _install_state(model)
    state = state_of(model)
    if state is not None:
        check_format(state.notes.get("meta", {}), str(path))
    model.__dict__[SOURCE] = str(path.resolve())
    if species is not None:
        model.__dict__[SPECIES] = check_given(species, type_names(model))
    elif SPECIES not in model.__dict__:  # a package of ours has it
        model.__dict__[SPECIES] = species_in_file(path)
    return model.to(device).eval()


def save(model: torch.nn.Module, path: str | Path) -> None:
    """Write a quantized model.

    Args:
        model: quantized model that was loaded from a file. That file holds what a checkpoint or package needs besides
            the model: data set, training settings, example structure.
        path: ``*.ckpt`` for a checkpoint of float weights on the quantized grid, to be compiled or packaged;
            ``*.nequip.zip`` for a package of integer codes. Nothing is left behind if writing fails.

    Raises:
        ValueError: if the model is not quantized, or a file of this kind cannot be made from the file it came from.
        FileNotFoundError: if the folder does not exist.
    """
    path = Path(path)
    if state_of(model) is None:
        raise ValueError("this model is not quantized: quantize it first.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist.")
    source = model.__dict__.get(SOURCE)
    if source is None or not Path(source).is_file():
        raise ValueError(
            "the file this model came from is not known, and NequIP's files hold more than the model. Load it with "
            "gaq.load(path), quantize that, and save it; or train with the key `quantization`."
        )
    kind = check_output(path, Path(source))
    with written_whole(path) as trial:
        if kind == CHECKPOINT:
            _save_checkpoint(model, Path(source), trial)
        else:
            _save_package(model, Path(source), trial)


def _save_checkpoint(model: torch.nn.Module, source: Path, path: Path) -> None:
    state = state_of(model)
    assert state is not None
    if state.status == "frozen":
        raise ValueError(f"{path.name}: a frozen model has no float weights left for a checkpoint; write a {PACKAGE}.")
    checkpoint = torch.load(source, map_location="cpu", weights_only=False)
    prefix = "model.sole_model."
    entries: Document = checkpoint["state_dict"]
    model_entries = model.state_dict()
    _check_same_tensors(entries, model_entries, prefix, source)
    for name, value in model_entries.items():
        # Whether constants of e3nn's generated code are buffers depends on the settings of the process.
        if "._tensor_constant" in name and prefix + name not in entries:
            continue
        entries[prefix + name] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
    # Inference takes the averaged weights, if there are any. They are stored in the order of the parameters.
    if "ema.ema_weight_0" in entries:
        for name in [name for name in entries if name.startswith("ema.ema_weight_")]:
            del entries[name]
        for i, parameter in enumerate(model.parameters()):
            entries[f"ema.ema_weight_{i}"] = parameter.detach().cpu().clone()
    spec = state.config.to_dict()
    hyper = checkpoint["hyper_parameters"]
    hyper["model"]["quantization"] = spec
    stored = (hyper.get("info_dict", {}).get("training_module") or {}).get("model")
    if isinstance(stored, dict):
        stored["quantization"] = spec
    for key in ("optimizer_states", "lr_schedulers"):
        checkpoint[key] = []
    for key in (SPECIES, EXAMPLE):
        if model.__dict__.get(key):
            checkpoint[key] = model.__dict__[key]
    torch.save(checkpoint, path)


def _check_same_tensors(entries: Document, model_entries: Document, prefix: str, source: Path) -> None:
    """Refuse to write a model into the checkpoint of another model.

    Raises:
        ModelFileError: if the model lacks tensors of the checkpoint or has them in another shape; names them.
    """
    differing = []
    for name, value in entries.items():
        if not name.startswith(prefix) or not isinstance(value, Tensor) or name.endswith("_extra_state"):
            continue
        counterpart = model_entries.get(name.removeprefix(prefix))
        # Whether constants of e3nn's generated code are buffers depends on the settings of the process.
        if "._tensor_constant" not in name and (counterpart is None or counterpart.shape != value.shape):
            differing.append(f"{name.removeprefix(prefix)} {tuple(value.shape)}")
    if differing:
        raise ModelFileError(
            f"{source}: the checkpoint this model was loaded from now holds tensors that the model has not "
            f"({', '.join(differing)}): it was overwritten. Load the model again."
        )


class _FirstThatKnows(OrderedImporter):
    """Names an object by the first importer that has it; `OrderedImporter` of torch 2.8 does not."""

    def get_name(self, obj: object, name: str | None = None) -> tuple[str, str]:
        errors: list[Exception] = []
        for importer in self._importers:
            try:
                return importer.get_name(obj, name)
            except (ObjNotFoundError, ObjMismatchError) as error:
                errors.append(error)
        raise errors[-1]


def _save_package(model: torch.nn.Module, source: Path, path: Path) -> None:
    """Write a package with the frozen model, in one copy and compressed."""
    import copy

    from nequip.model.saved_models.package import _get_package_metadata, _suppress_package_importer_exporter_warnings
    from nequip.scripts import _package_utils as utils
    from nequip.scripts.package import _CURRENT_NEQUIP_PACKAGE_VERSION
    from nequip.train.lightning import _SOLE_MODEL_KEY
    from nequip.utils.versions import get_current_code_versions
    from nequip.utils.versions.version_utils import get_version_safe

    frozen: AnyModule = copy.deepcopy(model).cpu()
    # By the model's own class: a model from a package has to be saved with the classes of the package.
    frozen.freeze_weights()
    for key in (SOURCE, EXAMPLE):
        frozen.__dict__.pop(key, None)
    importers: tuple[Importer, ...] = (sys_importer,)
    plain = path.with_name("plain" + PACKAGE)
    with _suppress_package_importer_exporter_warnings():
        if form_of(source) == PACKAGE:
            importer = _importer(source)
            config = importer.load_text("model", "config.yaml")
            metadata = _get_package_metadata(importer)
            # The package first, for classes that only it has; then the installation.
            importers = (importer, sys_importer)
            data = model.__dict__.get(EXAMPLE) or importer.load_pickle("model", "example_data.pkl")
        else:
            from omegaconf import OmegaConf

            checkpoint = torch.load(source, map_location="cpu", weights_only=False)
            info = dict(checkpoint["hyper_parameters"]["info_dict"])
            info.pop("versions", None)
            config = OmegaConf.to_yaml(info)
            metadata = {
                "external_modules": {k: get_version_safe(k) for k in utils._EXTERNAL_MODULES},
                "package_version_id": _CURRENT_NEQUIP_PACKAGE_VERSION,
                "atom_types": dict(enumerate(frozen.type_names)),
            }
            data = example_of(model, source)
        metadata["versions"] = get_current_code_versions(verbose=False)
        metadata["available_models"] = ["eager"]
        with torch.package.PackageExporter(str(plain), importer=_FirstThatKnows(*importers)) as exporter:
            exporter.mock([f"{name}.**" for name in utils._MOCK_MODULES])
            exporter.extern([f"{name}.**" for name in utils._EXTERNAL_MODULES])
            exporter.intern([f"{name}.**" for name in (*utils._INTERNAL_MODULES, "gaq", "gaq_nequip")])
            exporter.save_pickle("model", "example_data.pkl", data, dependencies=True)
            exporter.save_text("model", "config.yaml", config)
            exporter.save_text("model", "package_metadata.txt", yaml.dump(metadata, default_flow_style=False))
            modules = torch.nn.ModuleDict({_SOLE_MODEL_KEY: frozen})
            exporter.save_pickle("model", "eager_model.pkl", modules, dependencies=True)
    deflate(plain, path)
    plain.unlink()
