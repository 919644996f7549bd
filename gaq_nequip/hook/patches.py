"""The changes that the extension makes in NequIP; there are no others.

===========================================  ==================================================================
``NequIPLightningModule.__init__``           refuses a top-level key ``quantization`` that reached no model
``NequIPLightningModule._build_model``       inserts quantizers, before the averaged weights are made
``NequIPLightningModule.configure_callbacks``  adds the callback: schedule of the branches, ranges, scales
``NequIPLightningModule.training_step``      adds the equivariance loss, if asked for
``GraphModel.enable_GAQ``                    is the persistent modifier, for ``nequip.model.modify``
===========================================  ==================================================================

Without the key each of them does what NequIP's own does. NequIP ignores top-level keys it does not know. So if these
changes cannot be made, importing NequIP fails with the reason: a run must not train in full precision unnoticed.
"""

from __future__ import annotations

import contextvars
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gaq.untyped import AnyModule, Batch, Document, Patched, ReadOnlyDocument, TrainingModule

if TYPE_CHECKING:
    import torch

    from gaq.config.schema import QuantizationConfig

__all__ = ["KEY", "install"]

KEY = "quantization"
_MISSING = object()
_building: contextvars.ContextVar[int] = contextvars.ContextVar("gaq_building", default=0)
"""Number of builds under way; a model from a checkpoint is built within another build."""


def _plain(value: object) -> object:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _run_config() -> ReadOnlyDocument | None:
    """The configuration of the present `nequip-train` run; None outside a run."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    hydra: Any = HydraConfig.get()  # declared as a plain dataclass, which has no parent
    config: ReadOnlyDocument = hydra._get_parent()
    return config


def _top_level() -> object:
    """The value of the key at the top level of the run's configuration; refuses a key that looks like a typo of it."""
    config = _run_config()
    if config is None:
        return _MISSING
    if KEY in config:
        return _plain(config[KEY])
    for name in config:
        if difflib.get_close_matches(str(name).lower(), [KEY, "quantize", "quantized"], n=1, cutoff=0.75):
            raise ValueError(f"{name}: unknown key. Did you mean '{KEY}'? NequIP would ignore it and train in float.")
    return _MISSING


def _requested(model_config: ReadOnlyDocument) -> object:
    """The value of the key that applies to a model: its own, or the one at the top level."""
    of_model = _plain(model_config.get(KEY, _MISSING))
    if _building.get():
        return of_model  # a checkpoint is loaded within another build: the top level does not apply to its model
    config = _run_config()
    restart = config is not None and config.get("ckpt_path") is not None
    top = _top_level()
    if restart and config is not None and top is _MISSING:
        # NequIP takes the module of the checkpoint and ignores that of the YAML.
        written = (config.get("training_module") or {}).get("model") or {}
        top = _plain(written.get(KEY, _MISSING))
    if top is _MISSING:
        return of_model
    if of_model is _MISSING and restart:
        raise ValueError(
            f"{KEY}: this run continues a checkpoint that was trained in float (ckpt_path). To quantize it, start a "
            "new run with `training_module.model: {_target_: nequip.model.ModelFromCheckpoint, checkpoint_path: ...}`."
        )
    if of_model is not _MISSING and of_model != top:
        if not restart:
            raise ValueError(
                f"{KEY}: {top!r} at the top level, but {of_model!r} under training_module.model.{KEY}. Give it once."
            )
        _check_restart(top, of_model)
    return top


def _check_restart(written: object, stored: object) -> None:
    """Refuse a run that goes on from a checkpoint with a key that rounds otherwise than that of the checkpoint.

    Keys of the schedule, the data and the losses may differ; those of the new run apply.

    Raises:
        ValueError: naming both settings.
    """
    from gaq.config.parse import parse_config, parse_stored
    from gaq.model.state import describe_other_grid, same_grid

    given, before = parse_config(written), parse_stored(stored, finished=False).to_dict()
    if not same_grid(given.to_dict(), before):
        raise ValueError(f"{KEY}: {describe_other_grid(given, before)}")


def read_key(spec: object, loaded: bool) -> tuple[QuantizationConfig, bool]:
    """Parse a value of the key, which a user wrote or a file holds.

    Args:
        spec: value of the key.
        loaded: whether its model is loaded from a checkpoint within the build of another model.

    Returns:
        The configuration, and whether a user wrote it.

    Raises:
        gaq.config.parse.ConfigError: if the configuration cannot be used.
    """
    from nequip.scripts._workflow_utils import get_workflow_state

    from gaq.config.parse import parse_config, parse_stored

    run = _run_config()
    restarts = run is not None and run.get("ckpt_path") is not None and KEY not in run
    if get_workflow_state() == "train" and not loaded and not restarts:
        return parse_config(spec), True
    # The file may come from an earlier version.
    return parse_stored(spec, finished=not restarts), False


def is_trained(model_config: object) -> bool:
    """Whether a model configuration takes its weights from a trained model."""
    if isinstance(model_config, Mapping):
        target = str(model_config.get("_target_", ""))
        return target.endswith(("ModelFromCheckpoint", "ModelFromPackage")) or any(
            is_trained(value) for value in model_config.values()
        )
    return isinstance(model_config, list | tuple) and any(is_trained(value) for value in model_config)


def _patch_lightning(cls: Patched) -> None:
    original_init = cls.__init__
    original_build = cls._build_model
    original_callbacks = cls.configure_callbacks
    original_step = cls.training_step

    @functools.wraps(original_init)
    def __init__(self: TrainingModule, *args: object, **kwargs: object) -> None:
        original_init(self, *args, **kwargs)
        if _building.get() or getattr(self, "_gaq_considered", False):
            return
        if _top_level() is not _MISSING:
            raise ValueError(
                f"{KEY}: {type(self).__name__} builds its model without NequIPLightningModule._build_model, so the key "
                f"was not applied. Use `training_module.model: {{_target_: gaq_nequip.quantized, {KEY}: ..., model: "
                "...}}` in place of it."
            )

    @functools.wraps(original_build)
    def _build_model(self: TrainingModule, model_config: Document) -> AnyModule:
        explicit = str(model_config.get("_target_", "")).startswith("gaq_nequip.")
        # Our own builder reads the key itself; a key at the top level has to agree with it.
        spec = _requested(model_config)
        inner = {key: value for key, value in model_config.items() if explicit or key != KEY}
        token = _building.set(_building.get() + 1)
        try:
            model = original_build(self, inner)
        finally:
            _building.reset(token)
        self._gaq_considered = True
        if spec is _MISSING or spec is None or explicit:
            return model
        from gaq_nequip.training import start

        config, written = read_key(spec, loaded=_building.get() > 0)
        start(model, config, pretrained=is_trained(inner), written=written)
        _remember(self, model_config, spec)
        return model

    @functools.wraps(original_callbacks)
    def configure_callbacks(self: TrainingModule) -> list[object]:
        from gaq_nequip.training import QuantizationCallback, is_quantized

        original = original_callbacks(self)
        callbacks = list(original) if isinstance(original, list | tuple) else [original]
        if is_quantized(self.model):
            callbacks.append(QuantizationCallback())
        return callbacks

    @functools.wraps(original_step)
    def training_step(self: TrainingModule, batch: Batch, *args: object, **kwargs: object) -> object:
        loss = original_step(self, batch, *args, **kwargs)
        from gaq_nequip.training import add_equivariance_loss

        return add_equivariance_loss(self, batch, loss)

    cls.__init__ = __init__
    cls._build_model = _build_model
    cls.configure_callbacks = configure_callbacks
    cls.training_step = training_step


def _remember(module: TrainingModule, model_config: Document, spec: object) -> None:
    """Write the key into the hyperparameters of the checkpoint, so that loading it rebuilds the quantized model."""
    model_config[KEY] = spec
    hparams = module.hparams
    if isinstance(hparams.get("model"), dict):
        hparams["model"][KEY] = spec
    info = hparams.get("info_dict")
    stored = ((info or {}).get("training_module") or {}).get("model")
    if isinstance(stored, dict):
        stored[KEY] = spec


def _patch_modifiers(cls: Patched, model_modifier: Callable[..., Callable[..., object]]) -> None:
    def enable_GAQ(owner: type, model: AnyModule, preset: str = "gaq", **keys: object) -> torch.nn.Module:
        """Quantize the model: ``preset`` and the other keys of a quantization mapping."""
        from gaq_nequip.model import prepare

        config, written = read_key({"preset": preset, **keys}, loaded=_building.get() > 1)
        return prepare(model, config, written=written)

    cls.enable_GAQ = model_modifier(persistent=True)(classmethod(enable_GAQ))  # type: ignore[arg-type]  # takes class methods


def install() -> None:
    """Make the changes, once.

    Raises:
        ImportError: if the installed NequIP lacks something that is to be changed.
    """
    from importlib.metadata import version

    try:
        from nequip.nn.graph_model import GraphModel
        from nequip.nn.model_modifier_utils import model_modifier
        from nequip.scripts._package_utils import register_packaging_mode
        from nequip.train.lightning import NequIPLightningModule
    except ImportError as error:
        raise ImportError(f"gaq cannot find its place in nequip {version('nequip')}: {error}. {_ADVICE}") from error
    needed = ("_build_model", "configure_callbacks", "training_step")
    missing = [name for name in needed if not hasattr(NequIPLightningModule, name)]
    if missing:
        raise ImportError(
            f"gaq cannot find its place in nequip {version('nequip')}: NequIPLightningModule has no "
            f"{', '.join(missing)}. {_ADVICE}"
        )
    if getattr(NequIPLightningModule, "_gaq_patched", False):
        return
    _patch_lightning(NequIPLightningModule)
    _patch_modifiers(GraphModel, model_modifier)
    register_packaging_mode("gaq", lambda: ["eager"])
    NequIPLightningModule._gaq_patched = True


_ADVICE = "Install a version it supports, pip install 'nequip>=0.19.1,<0.20', or remove gaq."
