"""The explicit way: a model builder, for those who would rather see it in the configuration."""

from __future__ import annotations

from typing import Any

__all__ = ["quantized"]


def quantized(model: dict[str, Any], quantization: Any = "gaq", **keys: Any) -> Any:
    """Build a model and quantize it.

    .. code-block:: yaml

        training_module:
          model:
            _target_: gaq_nequip.quantized
            quantization: gaq
            model: {_target_: nequip.model.NequIPGNNModel, ...}

    Args:
        model: configuration of the model, with its own ``_target_``.
        quantization: preset or mapping, as for the key ``quantization``.
        keys: further arguments of that builder (``model_dtype``, ``type_names``, ...), added to `model`.

    Returns:
        The model, ready for training.

    Raises:
        gaq.ConfigError: for a configuration that cannot be used.
    """
    from hydra.utils import get_method

    from gaq_nequip.hook.patches import _building, is_trained, read_key
    from gaq_nequip.training import start

    inner = {**model, **keys}
    if "_target_" not in inner:
        raise ValueError("training_module.model.model: needs the key _target_, the builder of the model.")
    built = get_method(inner.pop("_target_"))(**inner)
    # One build is that of the training module this model belongs to.
    config = read_key(quantization, loaded=_building.get() > 1)
    start(built, config, pretrained=is_trained({**model, **keys}))
    return built
