"""Signatures of the C++ kernels, and of the torch operations that compiled files call. Each stands only here.

`KERNELS` gives the argument types by which Python calls a kernel (`argument_types`), and the prototype that the C++
source defines. `OPERATIONS` gives the registration of an operation with torch, the declaration of its C function for
Inductor (`c_shim`), and the prototype that `shims.cpp` defines. The prototypes are macros in a header that is written
when the kernels are compiled (`header`): ``GAQ_KERNEL(product, float32, float) { ... }`` and
``GAQ_SHIM(edge_product) { ... }``.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

__all__ = [
    "COEFFICIENTS",
    "DEPLOYED_VERSION",
    "DTYPES",
    "KERNELS",
    "OPERATIONS",
    "STEPS",
    "argument_types",
    "c_name",
    "c_shim",
    "header",
]

DTYPES = {"float32": "float", "float64": "double"}
"""Dtypes of the kernels: their names in torch and in C++. T below stands for the name in C++."""

KERNELS = {
    "convolution": (
        "const int64_t* ints, const double* reals, int64_t senders, int64_t receivers, int64_t edges, "
        "const int64_t* sender, const int64_t* receiver, const int64_t* tables, const T* vectors, const T* features, "
        "const T* weights, const T* scales, const T* radial, T* message, int64_t threads"
    ),
    "convolution_backward": (
        "const int64_t* ints, const double* reals, int64_t senders, int64_t receivers, int64_t edges, "
        "const int64_t* sender, const int64_t* receiver, const int64_t* tables, const T* vectors, const T* features, "
        "const T* weights, const T* scales, const T* radial, const T* grad, T* grad_vectors, T* grad_features, "
        "T* grad_weights, T* grad_scales, int64_t threads"
    ),
    "product": (
        "const int64_t* ints, const double* reals, int64_t atoms, int64_t edges, const int64_t* centre, "
        "const T* x, const T* y, const T* weights, T* out, int64_t threads"
    ),
    "product_backward": (
        "const int64_t* ints, const double* reals, int64_t atoms, int64_t edges, const int64_t* centre, "
        "const T* x, const T* y, const T* weights, const T* grad, T* grad_x, T* grad_y, int64_t threads"
    ),
    "contraction": (
        "const int64_t* ints, int64_t atoms, const int64_t* species, const T* features, const T* coefficients, "
        "T* out, int64_t threads"
    ),
    "contraction_backward": (
        "const int64_t* ints, int64_t atoms, const int64_t* species, const T* features, const T* coefficients, "
        "const T* grad, T* grad_features, int64_t threads"
    ),
    "round": (
        "const int64_t* ints, const double* reals, int64_t atoms, const T* features, T* rounded, int64_t threads"
    ),
    "program_new": (
        "const int64_t* code, int64_t code_count, const int64_t* ints, int64_t int_count, const double* reals, "
        "int64_t real_count, const T* constants, int64_t constant_count, const T* weights, int64_t* program"
    ),
    "program_delete": "int64_t program",
    "program_run": (
        "int64_t program, const int64_t* counts, const int64_t* const* integers, const double* const* reals, "
        "const T* const* inputs, T* const* outputs, double* energies, double* seconds, int64_t exchange, "
        "int64_t context"
    ),
    "edge_vectors": (
        "int64_t edges, const int64_t* sender, const int64_t* receiver, const T* positions, const T* shifts, T* vectors"
    ),
    "forces_and_strain": (
        "int64_t edges, const int64_t* sender, const int64_t* receiver, const int64_t* structure, const T* vectors, "
        "const T* grad, T* forces, double* strain"
    ),
}
"""Arguments of each kernel, as in C++. The kernel's source says which pointers may be null."""

STEPS = (
    *("gather", "linear", "round", "convolution", "convolution_back", "contraction", "contraction_back"),
    *("density", "density_back", "divide", "divide_back", "activation", "activation_back", "energy", "seed"),
    *("repulsion", "scale_shift", "add", "zero", "exchange", "exchange_back", "export", "gate", "gate_back", "copy"),
    *("given", "repeated", "transform"),
)
"""Operations of a program; `program.cpp` says what their arguments are."""

COEFFICIENTS = 6
"""Numbers that the polynomial of an interval of a radial table has for each path and channel."""
DEPLOYED_VERSION = 2
"""Version of the form of deployed files, which `potential.cpp` reads."""

_EDGES = (
    "Tensor features, Tensor vectors, Tensor weights, Tensor scales, Tensor ints, Tensor reals, Tensor sender, "
    "Tensor receiver, Tensor tables"
)

OPERATIONS = {
    "edge_convolution": f"({_EDGES}, SymInt rows_out, SymInt receivers) -> Tensor",
    "edge_convolution_backward": (
        f"(Tensor grad, {_EDGES}, SymInt receivers, bool of_features, bool of_weights) -> "
        "(Tensor, Tensor, Tensor, Tensor)"
    ),
    "edge_product": (
        "(Tensor x, Tensor y, Tensor weights, Tensor ints, Tensor reals, Tensor centre, SymInt rows_out) -> Tensor"
    ),
    "edge_product_backward": (
        "(Tensor grad, Tensor x, Tensor y, Tensor weights, Tensor ints, Tensor reals, Tensor centre) -> "
        "(Tensor, Tensor)"
    ),
    "rounded": "(Tensor features, Tensor ints, Tensor reals) -> Tensor",
}
"""Schemas of the operations ``gaq::NAME``, in torch's notation."""

_C_TYPES = {"Tensor": "AtenTensorHandle", "SymInt": "int64_t", "bool": "int32_t"}


def argument_types(kernel: str) -> list[Any]:  # of ctypes classes, whose base is private
    """Types of a kernel's arguments, for `ctypes`."""
    types = [argument.rsplit(" ", 1)[0] for argument in KERNELS[kernel].split(", ")]
    return [ctypes.c_void_p if type.endswith("*") else {"int64_t": ctypes.c_int64}[type] for type in types]


def c_name(kernel: str, dtype: str) -> str:
    """Name of a kernel's function for a dtype (a key of `DTYPES`)."""
    return f"gaq_{kernel}_{dtype}"


def c_shim(operation: str) -> str:
    """Declaration of an operation's C function, which AOTInductor calls."""
    matched = re.fullmatch(r"\((.*)\) -> (.*)", OPERATIONS[operation])
    assert matched is not None, operation
    declared = [argument.split(" ") for argument in matched[1].split(", ")]
    arguments = [f"{_C_TYPES[type]} {name}" for type, name in declared]
    results = [f"AtenTensorHandle* ret{i}" for i in range(matched[2].count("Tensor"))]
    return f"AOTITorchError aoti_torch_cpu_{operation}({', '.join(arguments + results)})"


def header() -> str:
    """Text of ``signatures.h``, which all C++ sources include."""
    lines = [
        "// Written by gaq/kernels/signatures.py.",
        "#pragma once",
        "#include <cstdint>",
        f"#define GAQ_COEFFICIENTS {COEFFICIENTS}",
        f"#define GAQ_DEPLOYED_VERSION {DEPLOYED_VERSION}",
        "#define GAQ_KERNEL(KERNEL, NAME, T) GAQ_KERNEL_##KERNEL(NAME, T)",
        "#define GAQ_SHIM(OPERATION) GAQ_SHIM_##OPERATION",
    ]
    for kernel, arguments in KERNELS.items():
        lines.append(f"#define GAQ_KERNEL_{kernel}(NAME, T) void {c_name(kernel, '##NAME')}({arguments})")
    prototypes = " ".join(f"GAQ_KERNEL_{kernel}(NAME, T);" for kernel in KERNELS)
    lines.append(f"#define GAQ_DECLARE_KERNELS(NAME, T) {prototypes}")
    lines.append(f"enum Step {{ {', '.join(f'STEP_{name}' for name in STEPS)} }};")
    lines += [f"#define GAQ_SHIM_{operation} {c_shim(operation)}" for operation in OPERATIONS]
    return "\n".join(lines) + "\n"
