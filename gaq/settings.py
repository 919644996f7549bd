"""The environment variables ``GAQ_*``, read once, as one object.

``gaq doctor`` prints them. The rest of the package calls `current`; `override` changes settings temporarily.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gaq.untyped import Document, ReadOnlyDocument

__all__ = ["Setting", "Settings", "SettingsError", "current", "override", "read", "rows", "unknown"]

logger = logging.getLogger(__name__)


class SettingsError(ValueError):
    """Invalid value of a variable; the message names variable, value and what is allowed."""


def _number_of_edges(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _length(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise ValueError
    return value


def _switch(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return parse


def _text(value: object) -> str:
    """Format a value as in the environment."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _about(variable: str, parse: Callable[[str], object], allowed: str) -> Document:
    return {"variable": variable, "parse": parse, "allowed": allowed}


@dataclass(frozen=True)
class Settings:
    """Settings from the environment. An empty variable counts as not set.

    Attributes:
        cache: ``GAQ_CACHE``, the folder of compiled kernels; None for ``gaq`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
        cuda_graphs: ``GAQ_CUDA_GRAPHS``, the largest number of edges of a step that is replayed as a CUDA graph;
            0 replays none. Larger steps keep the GPU busy without a graph, and a graph keeps the memory of a step. The
            default is an estimate of where the kernels of a step take about as long as launching them.
        engine: ``GAQ_ENGINE``, 1 or 0: whether converted MACE models run through the fused kernels.
        kernels: ``GAQ_KERNELS``, ``auto`` or ``triton``. ``triton`` is for tests: it sends operations on the CPU to
            Triton's interpreter (with ``TRITON_INTERPRET=1``).
        linear: ``GAQ_LINEAR``, ``float`` or ``int8``: how converted MACE models multiply by weights on a GPU.
        quantization: ``GAQ_QUANTIZATION``, a preset or a mapping in YAML, for ``mace_run_train``. MACE's parser
            reads and checks it like any other option; None trains in float.
        skin: ``GAQ_SKIN``, length in Å by which MACE's neighbour lists reach beyond the cutoff; 0 rebuilds the list in
            every step.
    """

    cache: Path | None = field(default=None, metadata=_about("GAQ_CACHE", Path, "a folder"))
    cuda_graphs: int = field(
        default=100_000,
        metadata=_about("GAQ_CUDA_GRAPHS", _number_of_edges, "a number of edges, or 0 to record no graphs"),
    )
    engine: bool = field(default=True, metadata=_about("GAQ_ENGINE", _switch, "1, or 0 to turn the fused kernels off"))
    kernels: str = field(
        default="auto",
        metadata=_about(
            "GAQ_KERNELS", _one_of("auto", "triton"), "auto, or triton for Triton's interpreter on the CPU"
        ),
    )
    linear: str = field(
        default="float",
        metadata=_about("GAQ_LINEAR", _one_of("float", "int8"), "int8, or float as if it were not set"),
    )
    quantization: str | None = field(
        default=None, metadata=_about("GAQ_QUANTIZATION", str, "a preset or a mapping in YAML")
    )
    # Mean time to make a batch, lists included, at steps of 1 fs, 300 K, cutoff 5 Å, one thread, on a shared machine.
    # Azobenzene: 1.8 ms without a skin; 0.7, 0.6 and 0.6 ms with 0.3, 0.7 and 1.5 Å (a list served 4, 13 and 99 steps).
    # 192 atoms of water: 4.9 ms without; 2.1, 1.5, 1.4 and 2.1 ms with 0.3, 0.7, 1.0 and 1.5 Å (3, 7, 10 and 15 steps).
    # Between 0.5 and 1 Å the time hardly differs, and a shorter list takes less memory.
    skin: float = field(
        default=0.7,
        metadata=_about("GAQ_SKIN", _length, "a length in Å, such as 0.5, or 0 to make every neighbour list anew"),
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is not None:
                _parsed(setting.metadata, _text(value))


def _parsed(metadata: ReadOnlyDocument, text: str) -> Any:  # of the setting's type
    """Parse the text of a variable.

    Raises:
        SettingsError: if the value is not allowed.
    """
    try:
        return metadata["parse"](text)
    except (ValueError, KeyError):
        raise SettingsError(
            f"{metadata['variable']}={text!r} is not allowed; give {metadata['allowed']}, or do not set it."
        ) from None


_VARIABLES = {setting.metadata["variable"]: setting for setting in fields(Settings)}


def unknown(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Find variables that begin with ``GAQ_`` and are not ours, each with a remark for the user."""
    remarks = {}
    for name in sorted(os.environ if environment is None else environment):
        if name.startswith("GAQ_") and name not in _VARIABLES:
            near = difflib.get_close_matches(name, _VARIABLES, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(_VARIABLES)}."
            remarks[name] = f"unknown, and ignored. {hint}"
    return remarks


def read(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the settings of an environment, by default that of this process.

    Raises:
        SettingsError: for a value that is not allowed.
    """
    texts = os.environ if environment is None else environment
    values = {
        setting.name: _parsed(setting.metadata, texts[variable])
        for variable, setting in _VARIABLES.items()
        if texts.get(variable)
    }
    return Settings(**values)


_lock = threading.Lock()
_current: Settings | None = None
_overridden: frozenset[str] = frozenset()


def current() -> Settings:
    """Return the settings of this process. The first call reads the environment; variables set later have no effect.

    Raises:
        SettingsError: for a value in the environment that is not allowed.
    """
    global _current
    if _current is None:
        with _lock:
            if _current is None:
                settings = read()
                for name, remark in unknown().items():
                    logger.warning(f"{name}: {remark}")
                _current = settings
    return _current


@contextmanager
def override(**values: Any) -> Iterator[Settings]:
    """Change settings within this context, in every thread of the process.

    Args:
        values: new values by the names of `Settings`, such as ``engine=False``.

    Raises:
        SettingsError: for a value that is not allowed.
        TypeError: for a name that is not one of `Settings`.
    """
    global _current, _overridden
    before = current(), _overridden
    changed = replace(before[0], **values)
    _current, _overridden = changed, _overridden | frozenset(values)
    try:
        yield changed
    finally:
        _current, _overridden = before


@dataclass(frozen=True)
class Setting:
    """A variable for display: its name, its value, the source of the value, and what is wrong with it, if anything."""

    variable: str
    value: str
    source: str
    problem: str | None = None


def rows() -> list[Setting]:
    """List every variable with its value and source, unknown variables last; invalid values raise nothing."""
    settings = []
    for variable, setting in _VARIABLES.items():
        text = os.environ.get(variable, "")
        value, source, problem = setting.default, "default", None
        if setting.name in _overridden:
            value, source = getattr(_current, setting.name), "set by the program"
        elif text:
            source = "environment"
            try:
                value = _parsed(setting.metadata, text)
            except SettingsError:
                value, problem = text, f"not allowed; give {setting.metadata['allowed']}"
        settings.append(Setting(variable, "-" if value is None else _text(value), source, problem))
    settings += [Setting(name, os.environ[name], "environment", remark) for name, remark in unknown().items()]
    return settings
