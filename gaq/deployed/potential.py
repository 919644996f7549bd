"""A deployed file, opened by the C++ code that pair styles use as well."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gaq.caches import cached
from gaq.kernels.cpu import native

__all__ = ["Exchange", "Potential"]

MESSAGE = 4096
"""Bytes of an error's text."""
_EXCHANGE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)

Exchange = Callable[[bool, Tensor], None]
"""Exchange in Python: whether gradients come back, and rows of all atoms, (atoms, width), changed in place."""


@cached(most=1)
def _library() -> ctypes.CDLL:
    """The compiled kernels, with the functions of ``potential.h`` declared.

    Raises:
        gaq.kernels.cpu.native.CompilerError: where they cannot be built.
    """
    library = native.library()
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "open": (pointer, [ctypes.c_char_p, integer, pointer, ctypes.c_char_p, ctypes.c_char_p, integer]),
        "close": (None, [pointer]),
        "cutoff": (ctypes.c_double, [pointer]),
        "width": (integer, [pointer]),
        "bytes": (integer, [pointer]),
        "compute": (
            None,
            [
                *(pointer, integer, integer, pointer, integer, pointer, pointer, pointer),
                *(pointer, pointer, integer, pointer, pointer),
            ],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"gaq_potential_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class Potential:
    """A deployed model; safe to use from several threads.

    Args:
        path: file that `gaq deploy` wrote.
        symbols: elements that the caller's types of atoms stand for.
        head: of a model with several; None for the first.

    Attributes:
        r_max: cutoff in Å.
        width: most numbers of an atom that an exchange moves.
        dtype: of features.

    Raises:
        ValueError: if the file is not whole, of another version, or does not know an element or the head.
        gaq.kernels.cpu.native.CompilerError: where the kernels cannot be built.
    """

    def __init__(self, path: str | Path, symbols: Sequence[str], head: str | None = None) -> None:
        library = _library()
        message = ctypes.create_string_buffer(MESSAGE)
        names = (ctypes.c_char_p * len(symbols))(*(symbol.encode() for symbol in symbols))
        chosen = None if head is None else head.encode()
        self._handle = library.gaq_potential_open(str(path).encode(), len(symbols), names, chosen, message, MESSAGE)
        if not self._handle:
            raise ValueError(f"{message.value.decode(errors='replace')}.")
        weakref.finalize(self, library.gaq_potential_close, self._handle)
        self.r_max: float = library.gaq_potential_cutoff(self._handle)
        self.width: int = library.gaq_potential_width(self._handle)
        self.dtype = torch.float32 if library.gaq_potential_bytes(self._handle) == 4 else torch.float64
        self._compute = library.gaq_potential_compute

    def __call__(
        self,
        types: Tensor,
        sender: Tensor,
        receiver: Tensor,
        vectors: Tensor,
        local: int | None = None,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute energies of local atoms and the gradient of their sum by the vectors.

        Args:
            types: of all atoms, local ones first, (atoms,), int64.
            sender: of each edge, (edges,), int64.
            receiver: of each edge, a local atom, (edges,), int64.
            vectors: from sender to receiver, (edges, 3) in Å, float64; edges beyond the cutoff are ignored.
            local: number of local atoms; None where all are.
            exchange: copies features to the others, and adds gradients back.

        Returns:
            Energies, (local,) in eV, and the gradient, (edges, 3) in eV/Å; float64.
        """
        local = types.numel() if local is None else local
        energies, gradient = vectors.new_empty(local), torch.empty_like(vectors)
        failed: list[BaseException] = []
        called = None if exchange is None else _EXCHANGE(self._callback(exchange, types.numel(), failed))
        self._compute(
            self._handle,
            local,
            types.numel(),
            types.data_ptr(),
            sender.numel(),
            sender.data_ptr(),
            receiver.data_ptr(),
            vectors.data_ptr(),
            None if called is None else ctypes.cast(called, ctypes.c_void_p),
            None,
            torch.get_num_threads(),
            energies.data_ptr(),
            gradient.data_ptr(),
        )
        if failed:
            raise failed[0]
        return energies, gradient

    def _callback(self, exchange: Exchange, atoms: int, failed: list[BaseException]) -> Callable[..., None]:
        """An exchange as C++ calls it. What it raises is kept: it cannot pass through C++."""
        import numpy as np

        number = ctypes.c_float if self.dtype == torch.float32 else ctypes.c_double

        def call(_context: int | None, back: int, rows: int, width: int) -> None:
            try:
                memory = ctypes.cast(rows, ctypes.POINTER(number))
                exchange(bool(back), torch.from_numpy(np.ctypeslib.as_array(memory, (atoms, width))))
            except BaseException as error:  # an interruption as well; raised when C++ has returned
                failed.append(error)

        return call
