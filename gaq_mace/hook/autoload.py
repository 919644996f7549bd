"""What torch runs when it is imported: a finder that waits for a few MACE modules.

MACE has no plugin system, and its command refuses unknown keys. When torch is imported it imports every entry point of
the group ``torch.backends``, and that is before MACE's modules are loaded. This file must stay tiny and must never
raise: an exception here would break ``import torch`` or ``import mace``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from gaq_mace.names import TARGETS


class _PatchingLoader(Loader):
    """Loads a module as usual, then hands it to `gaq_mace.hook.patches`."""

    def __init__(self, inner: Any) -> None:  # any loader: importlib has no type for what all of them have
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        try:
            from gaq_mace.hook import patches

            patches.apply(module)
        except Exception as error:
            print(f"gaq: {module.__name__} could not be patched ({error}); see `gaq doctor`.", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in TARGETS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


def install() -> None:
    """Entry point of the group ``torch.backends``."""
    try:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:
        print(f"gaq: the MACE hook could not be installed ({error}); use gaq_mace_train.", file=sys.stderr)
