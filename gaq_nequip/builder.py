"""A model builder that quantizes, for users who want to see the quantization in the model's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gaq.untyped import Document

if TYPE_CHECKING:
    import torch

__all__ = ["quantized"]


def quantized(model: Document, quantization: object = "gaq", **keys: object) -> torch.nn.Module:
    """Build a model and quantize it.

    .. code-block:: yaml

        training_module:
          model:
            _target_: gaq_nequip.quantized
            quantization: gaq
            model: {_target_: nequip.model.NequIPGNNModel, ...}

    Args:
        model: configuration of the float model; its ``_target_`` is the builder that is called.
        quantization: preset or mapping, as for the key ``quantization``.
        keys: further arguments of that builder (``model_dtype``, ``type_names``, ...), added to `model`.

    Returns:
        The model, ready for training.

    Raises:
        gaq.ConfigError: if the quantization cannot be used.
        ValueError: if `model` has no ``_target_``.
    """
    from hydra.utils import get_method

    from gaq_nequip.hook.patches import _building, is_trained, read_key
    from gaq_nequip.training import start

    model_config = {**model, **keys}
    if "_target_" not in model_config:
        raise ValueError("training_module.model.model: needs the key _target_, the builder of the model.")
    pretrained = is_trained(model_config)
    built = get_method(model_config.pop("_target_"))(**model_config)
    # The first build under way is that of the training module; a second one means that a checkpoint is being loaded.
    config, written = read_key(quantization, loaded=_building.get() > 1)
    start(built, config, pretrained=pretrained, written=written)
    return built
