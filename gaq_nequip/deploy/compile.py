"""Compiling a loaded and frozen model by NequIP's own compilation, with the fused kernels if asked for."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaq.third_party_warnings import known_hidden
from gaq.untyped import AnyModule, Options
from gaq_nequip import files
from gaq_nequip.deploy import artefact
from gaq_nequip.example import example_data, with_cell
from gaq_nequip.host import nequip_state
from gaq_nequip.packed import widen_codes
from gaq_nequip.root import COMPILES

__all__ = ["check_compiler", "compile_file", "compile_model", "frozen_copy", "save_data", "tolerating"]


def check_compiler() -> None:
    """Refuse to compile where Inductor has no C++ compiler.

    Raises:
        ValueError: saying what helps.
    """
    from torch._inductor import config as inductor
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        tried = ", ".join(str(name) for name in inductor.cpp.cxx if name)
        raise ValueError(
            f"compiled files need a C++ compiler, and {tried} does not run here: install g++ or set CXX, or write a "
            ".nequip.zip package, which needs none."
        ) from error


def frozen_copy(model: AnyModule, to_compile: bool) -> AnyModule:
    """A copy of a quantized model with integer weights, for a compiled file (`to_compile`) or a package."""
    frozen = copy.deepcopy(model)
    frozen.__dict__[COMPILES] = to_compile
    return frozen.freeze_weights()


def compile_file(
    source: Path,
    output: Path,
    target: str,
    device: str,
    fused: bool = False,
    tolerance: float = 0.0,
    frozen: bool = True,
) -> None:
    """Load a model and compile it; see `compile_model`.

    Args:
        source: quantized checkpoint or package; a float one if `frozen` is False.
        output: compiled file.
        target: a target of `nequip-compile`.
        device: cpu or cuda.
        fused: whether convolutions go through the fused kernel, which the file then carries.
        tolerance: force difference, meV/Å, that the rounding of features may make between two orders of summation.
        frozen: whether weights are stored as integers; False for a float model.
    """
    model = files.load(source)
    if frozen:
        model = frozen_copy(model, to_compile=True)
    compile_model(model, example_data(source), output, target, device, fused, tolerance)


def compile_model(
    model: torch.nn.Module,
    example: dict[str, Tensor],
    output: Path,
    target: str,
    device: str,
    fused: bool,
    tolerance: float,
) -> None:
    """Compile a model by `nequip-compile`, slim the result, and write it to `output`.

    Args:
        model: float or frozen model; it is changed, so do not use it afterwards.
        example: a structure, as `gaq_nequip.example.example_data` returns it.
        output: compiled file. The example is left beside it.
        target: a target of `nequip-compile`.
        device: cpu or cuda.
        fused: whether convolutions go through the fused kernel, which the file then carries.
        tolerance: force difference, meV/Å, that the rounding of features may make between two orders of summation.
    """
    from nequip.scripts import compile as nequip_compile

    widen_codes(model)
    path = output.with_name("example.pt")
    save_data(with_cell(example), path)
    arguments = ["--mode", "aotinductor", "--device", device, "--target", target, "--data-path", str(path)]
    with ExitStack() as stack:
        stack.enter_context(nequip_state())
        stack.enter_context(_logging_unchanged())
        stack.enter_context(tolerating(1e-3 * tolerance))
        if fused:
            stack.enter_context(_fused_kernels(model, device))
        stack.enter_context(_in_place_of_loading(model))
        # NequIP loads no file here: "model" is a placeholder for its path.
        nequip_compile.main(["model", str(output), *arguments])
    if not artefact.slim(output, output):
        print("nequip-deploy: the debug symbols could not be stripped (program `strip`), and stay.", file=sys.stderr)


@contextmanager
def _in_place_of_loading(model: torch.nn.Module) -> Iterator[None]:
    """Within this context `nequip-compile` takes a given model in place of loading one."""
    from nequip.scripts import compile as nequip_compile

    before = nequip_compile.load_saved_model
    nequip_compile.load_saved_model = lambda *args, **kwargs: model
    try:
        yield
    finally:
        nequip_compile.load_saved_model = before


@contextmanager
def _fused_kernels(model: torch.nn.Module, device: str) -> Iterator[None]:
    """Fuse the convolutions of a model; within this context Inductor links the kernels into what it compiles."""
    from torch._inductor import config as inductor

    from gaq.kernels.cpu import native
    from gaq.kernels.shims import c_shims
    from gaq_nequip.engine.fused import fuse

    options: Options = {}
    before = os.environ.get("LIBRARY_PATH")
    if device.split(":")[0] == "cpu":  # for a GPU Inductor compiles the Triton kernels it sees
        options = {
            "aot_inductor.custom_ops_to_c_shims": c_shims(),
            "aot_inductor.custom_op_libs": [native.STATIC_NAME],
            "aot_inductor.use_runtime_constant_folding": True,
        }
        folder = str(native.static_library(model.model_dtype))
        os.environ["LIBRARY_PATH"] = folder if not before else f"{folder}{os.pathsep}{before}"
    try:
        for name, reason in fuse(model, device).items():
            print(f"nequip-deploy: {name} keeps NequIP's own convolution: {reason}", file=sys.stderr)
        with inductor.patch(options), _constructors_folded():
            yield
    finally:
        if before is None:
            os.environ.pop("LIBRARY_PATH", None)
        else:
            os.environ["LIBRARY_PATH"] = before


@contextmanager
def _constructors_folded() -> Iterator[None]:
    """Let Inductor fold what begins with the making of a tensor, as radial tables and weights made of codes do.

    A compiled file then makes them once, at its first step, and not in each: on 24 atoms that is half of a step.
    Inductor itself leaves out what begins so, because its result may be larger than what makes it.
    """
    from torch._inductor import compile_fx

    fold = compile_fx.split_const_gm
    if "skip_constructor" not in inspect.signature(fold).parameters:
        print(
            f"nequip-deploy: torch {torch.__version__} folds constants in another way: the file makes its radial "
            "tables in every step, which is slower on small structures.",
            file=sys.stderr,
        )
        yield
        return

    def fold_all(module: AnyModule, *args: Any, **options: Any) -> Any:  # as torch passes them on
        return fold(module, *args[1:], **{**options, "skip_constructor": False})

    patched: AnyModule = compile_fx  # an attribute of a module takes any function
    patched.split_const_gm = fold_all
    try:
        yield
    finally:
        patched.split_const_gm = fold


def _worth_saying(record: logging.LogRecord) -> bool:
    """Whether a user can do anything about a warning of Inductor: not about how it calls torch's determinant."""
    return "_linalg_det" not in record.getMessage()


@contextmanager
def _logging_unchanged() -> Iterator[None]:
    """Restore the disabled level of logging afterwards: compilation turns on logs that the caller may have disabled."""
    before, inductor = logging.root.manager.disable, logging.getLogger("torch._inductor.ir")
    inductor.addFilter(_worth_saying)
    try:
        yield
    finally:
        inductor.removeFilter(_worth_saying)
        logging.disable(before)


@contextmanager
def tolerating(force: float) -> Iterator[None]:
    """Within this context NequIP lets compiled float32 models differ from eager ones by at least `force`, eV/Å.

    NequIP's own bound, 5e-5, allows for sums in another order. A rounded feature on the edge of two steps may then fall
    to the other side, which costs one step of its rounding.
    """
    from nequip.utils import dtype

    before = dtype._FLOAT32_MODEL_TOL
    # At most 1e3: NequIP multiplies the bound, and infinity times zero is NaN.
    dtype._FLOAT32_MODEL_TOL = min(max(before, force), 1e3)  # type: ignore[misc]  # NequIP declares it Final
    try:
        yield
    finally:
        dtype._FLOAT32_MODEL_TOL = before  # type: ignore[misc]  # Final, as above


def save_data(data: dict[str, Tensor], path: Path) -> None:
    """Write data as `nequip-compile --data-path` reads it: the state of a TorchScript module."""
    holder = torch.nn.Module()
    for name, value in data.items():
        holder.register_buffer(name, value)
    with known_hidden():  # TorchScript is deprecated, but NequIP asks for it
        torch.jit.save(torch.jit.script(holder), path)
