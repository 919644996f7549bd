"""The environment variables ``GAQ_*``, read once, as one object.

``gaq doctor`` prints them. `current` is what the rest of the package asks; `override` changes them for a while.
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

__all__ = ["Setting", "Settings", "SettingsError", "current", "override", "read", "rows", "unknown"]

logger = logging.getLogger(__name__)


class SettingsError(ValueError):
    """A variable with a value that is not allowed; the message names variable, value and what is allowed."""


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


def _text(value: Any) -> str:
    """A value as one would write it into the environment."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _about(variable: str, parse: Callable[[str], Any], allowed: str) -> dict[str, Any]:
    return {"variable": variable, "parse": parse, "allowed": allowed}


@dataclass(frozen=True)
class Settings:
    """What the environment says about how this package runs. An empty variable counts as not set.

    Attributes:
        cache: ``GAQ_CACHE``, the folder of compiled kernels; None for ``gaq`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
        cuda_graphs: ``GAQ_CUDA_GRAPHS``, the largest number of edges of a step that is replayed as a CUDA graph;
            0 replays none. Larger steps keep the GPU busy, and a graph holds on to the memory of a step. The default
            is an estimate: there the kernels of a step take about as long as launching them.
        engine: ``GAQ_ENGINE``, 1 or 0: whether converted MACE models run through the fused kernels.
        kernels: ``GAQ_KERNELS``, ``auto`` or ``triton``: the latter sends operations on the CPU to Triton's
            interpreter (with ``TRITON_INTERPRET=1``), which is for tests.
        linear: ``GAQ_LINEAR``, ``float`` or ``int8``: how converted MACE models multiply by weights on a GPU.
        quantization: ``GAQ_QUANTIZATION``, a preset or a mapping in YAML, for ``mace_run_train``. MACE's own parser
            reads and checks it, as any of its options; None trains in float.
        skin: ``GAQ_SKIN``, Å by which MACE's neighbour lists reach beyond the cutoff; 0 makes each list anew.
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
    # Steps of 1 fs at 300 K, cutoff 5 Å, one thread, on a shared machine, means with the making of lists: the batch of
    # azobenzene took 1.8 ms without a skin and 0.7, 0.6 and 0.6 ms with 0.3, 0.7 and 1.5 Å (a list served 4, 13 and 99
    # steps); that of 192 atoms of water 4.9 ms without, and 2.1, 1.5, 1.4 and 2.1 ms with 0.3, 0.7, 1.0 and 1.5 Å (3,
    # 7, 10 and 15 steps). Between 0.5 and 1 Å it hardly matters, and a shorter list takes less memory.
    skin: float = field(
        default=0.7,
        metadata=_about("GAQ_SKIN", _length, "a length in Å, such as 0.5, or 0 to make every neighbour list anew"),
    )

    def __post_init__(self) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            if value is not None:
                _parsed(own.metadata, _text(value))


def _parsed(metadata: Mapping[str, Any], text: str) -> Any:
    """The value of a variable.

    Raises:
        SettingsError: if it is not allowed.
    """
    try:
        return metadata["parse"](text)
    except (ValueError, KeyError):
        raise SettingsError(
            f"{metadata['variable']}={text!r} is not allowed; give {metadata['allowed']}, or do not set it."
        ) from None


_VARIABLES = {own.metadata["variable"]: own for own in fields(Settings)}


def unknown(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that begin with ``GAQ_`` and are none of ours, each with a remark for the user."""
    found = {}
    for name in sorted(os.environ if environment is None else environment):
        if name.startswith("GAQ_") and name not in _VARIABLES:
            near = difflib.get_close_matches(name, _VARIABLES, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(_VARIABLES)}."
            found[name] = f"unknown, and ignored. {hint}"
    return found


def read(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of an environment, by default that of this process.

    Raises:
        SettingsError: for a value that is not allowed.
    """
    given = os.environ if environment is None else environment
    values = {own.name: _parsed(own.metadata, given[name]) for name, own in _VARIABLES.items() if given.get(name)}
    return Settings(**values)


_lock = threading.Lock()
_current: Settings | None = None
_overridden: frozenset[str] = frozenset()


def current() -> Settings:
    """The settings of this process. The environment is read at the first call, and a variable set later does nothing.

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
    """Within this context these settings hold, in every thread of the process.

    Args:
        values: by the names of `Settings`, such as ``engine=False``.

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
    """One variable for the eye: its name, its value, where that comes from, and what is wrong with it, if anything."""

    variable: str
    value: str
    source: str
    problem: str | None = None


def rows() -> list[Setting]:
    """Every variable with its value and where it comes from, unknown ones at the end; raises for none of them."""
    found = []
    for variable, own in _VARIABLES.items():
        text = os.environ.get(variable, "")
        value, source, problem = own.default, "default", None
        if own.name in _overridden:
            value, source = getattr(_current, own.name), "set by the program"
        elif text:
            source = "environment"
            try:
                value = _parsed(own.metadata, text)
            except SettingsError:
                value, problem = text, f"not allowed; give {own.metadata['allowed']}"
        found.append(Setting(variable, "-" if value is None else _text(value), source, problem))
    found += [Setting(name, os.environ[name], "environment", remark) for name, remark in unknown().items()]
    return found
