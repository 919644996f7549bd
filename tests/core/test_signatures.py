"""One table of signatures: Python's calls, the C++ sources and the declarations for Inductor follow it."""

from __future__ import annotations

import ctypes
import inspect
import re
from pathlib import Path

import pytest
import torch

from gaq.kernels import convolution, product, rounding, signatures
from gaq.kernels.cpu import native

FOLDER = Path(native.__file__).parent
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64


def test_argument_types() -> None:
    assert signatures.argument_types("round") == [POINTER, POINTER, INTEGER, POINTER, POINTER, INTEGER]
    assert signatures.argument_types("program_run")[:4] == [INTEGER, POINTER, POINTER, POINTER]
    planned = [kernel for kernel, arguments in signatures.KERNELS.items() if arguments.endswith("int64_t threads")]
    assert len(planned) == 7
    for kernel in planned:
        assert signatures.argument_types(kernel)[-1] is INTEGER  # the threads
        assert signatures.argument_types(kernel)[0] is POINTER  # the plan


def test_declarations_for_inductor() -> None:
    assert signatures.c_shim("rounded") == (
        "AOTITorchError aoti_torch_cpu_rounded(AtenTensorHandle features, AtenTensorHandle ints, "
        "AtenTensorHandle reals, AtenTensorHandle* ret0)"
    )
    assert signatures.c_shim("edge_convolution_backward").endswith(
        "AtenTensorHandle tables, int64_t receivers, int32_t of_features, int32_t of_weights, AtenTensorHandle* ret0, "
        "AtenTensorHandle* ret1, AtenTensorHandle* ret2, AtenTensorHandle* ret3)"
    )
    assert "AtenTensorHandle centre, int64_t rows_out, AtenTensorHandle* ret0)" in signatures.c_shim("edge_product")


@pytest.mark.parametrize("name", list(signatures.OPERATIONS))
def test_operations_are_registered_as_the_table_has_them(name: str) -> None:
    registered = getattr(torch.ops.gaq, name).default._schema
    assert str(registered) == f"gaq::{name}{signatures.OPERATIONS[name]}"
    functions = {
        "edge_convolution": convolution._convolution,
        "edge_convolution_backward": convolution._convolution_backward,
        "edge_product": product._product,
        "edge_product_backward": product._product_backward,
        "rounded": rounding._rounded,
    }
    # The function of Python, which its registration calls by position.
    parameters = inspect.signature(functions[name]._init_fn).parameters
    assert list(parameters) == [argument.name for argument in registered.arguments]


def test_no_signature_stands_in_a_source() -> None:
    """Each kernel and each C function is defined once, by its name in the table."""
    sources = {path.name: path.read_text() for path in FOLDER.glob("*.cpp")}
    assert set(native.SOURCES) | set(native.SHIM_SOURCES) == set(sources)
    text = "".join(sources.values())
    assert sorted(re.findall(r"GAQ_KERNEL\((\w+), NAME, T\)", text)) == sorted(signatures.KERNELS)
    assert sorted(re.findall(r"GAQ_SHIM\((\w+)\)", text)) == sorted(signatures.OPERATIONS)
    # The functions of deployed files are declared in a header, for programs in C.
    declared = re.findall(r"\bgaq_potential_(\w+)\(", (FOLDER / "potential.h").read_text())
    assert sorted(declared) == sorted(re.findall(r"\bgaq_potential_(\w+)\(", sources["potential.cpp"]))
    assert set(re.findall(r"void (gaq_\w+)\(", text)) <= {f"gaq_potential_{name}" for name in declared}
    assert "AOTITorchError aoti_torch_cpu_" not in text
    assert "extern" not in signatures.header()


@pytest.mark.skipif(not native.available(), reason="no C++ compiler here")
def test_the_library_has_every_kernel() -> None:
    for kernel in signatures.KERNELS:
        for dtype in signatures.DTYPES:
            function = getattr(native.library(), signatures.c_name(kernel, dtype))
            assert function.argtypes == signatures.argument_types(kernel)
            assert function.restype is None
            with pytest.raises(TypeError, match="argument"):
                function()
