"""GAQ: geometric-aware quantization of equivariant interatomic potentials.

    import gaq

    gaq.prepare(model, "gaq")             # insert quantizers, in place
    gaq.calibrate(model, structures)      # ranges and, after training, rounding
    gaq.convert(model)                    # round the weights for good
    print(gaq.summary(model))

The core imports neither MACE nor NequIP: adapters register under the entry point group ``gaq.adapters``.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ConfigError": "gaq.config.parse",
    "PRESETS": "gaq.config.parse",
    "QuantizationConfig": "gaq.config.parse",
    "parse_config": "gaq.config.parse",
    "calibrate": "gaq.api",
    "convert": "gaq.api",
    "deploy": "gaq.deployment",
    "load": "gaq.api",
    "prepare": "gaq.api",
    "quantize": "gaq.api",
    "report": "gaq.api",
    "save": "gaq.api",
    "select": "gaq.api",
    "sensitivity": "gaq.api",
    "summary": "gaq.api",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy: the MACE hook imports this package while torch itself is still being imported.
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'gaq' has no attribute {name!r}")
