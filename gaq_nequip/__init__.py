"""NequIP adapter of GAQ: an extension that NequIP loads by itself.

Importing it teaches `nequip-train` the key ``quantization``; see `gaq_nequip.hook.patches`. This file is not embedded
in packages: a packaged model takes only the modules that its classes come from.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

_PUBLIC = {
    "NequIPAdapter": "gaq_nequip.adapter",
    "load": "gaq_nequip.files",
    "quantized": "gaq_nequip.builder",
    "save": "gaq_nequip.files",
}
__all__ = ["NequIPAdapter", "load", "quantized", "save"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'gaq_nequip' has no attribute {name!r}")


# Without NequIP there is nothing to change: `nequip-deploy` says so, and the names above when they are used.
if find_spec("nequip") is not None:
    from gaq.home import home_or_stand_in as _home_or_stand_in

    with _home_or_stand_in():  # for the commands, whose modules lie in this package
        from gaq_nequip.hook import patches as _hook

        _hook.install()
