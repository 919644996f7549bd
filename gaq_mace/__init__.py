"""MACE adapter of GAQ.

This package is imported while torch itself is being imported (see `gaq_mace.hook.autoload`), so it imports
nothing at the top: `gaq_mace.load` and the other public names are resolved on first use.
"""

from __future__ import annotations

from typing import Any

_PUBLIC = {
    "MACEAdapter": "gaq_mace.adapter",
    "load": "gaq_mace.files",
    "save": "gaq_mace.files",
}
__all__ = ["MACEAdapter", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'gaq_mace' has no attribute {name!r}")
