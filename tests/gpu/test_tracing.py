"""Traces through the GPU kernels of contraction, rounding and linear layers: same values and gradients, for any size.

Convolutions are traced in `test_convolution`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from traced import printed

from gaq.config.schema import ScalarConfig, VectorConfig
from gaq.files.packing import pack_int4
from gaq.kernels import contraction, linear, rounding
from gaq.quantizers.features import FeatureLayout, FeatureQuantizer

CHANNELS = 6
MODULES = ("gaq.kernels.gpu.contraction", "gaq.kernels.gpu.rounding", "gaq.kernels.gpu.linear")
for module in MODULES:
    pytest.importorskip(module, reason="needs Triton: pip install '.[gpu]'", exc_type=ImportError)

Operation = Callable[..., Tensor]
Made = tuple[Operation, Callable[[int], list[Tensor]]]
"""A function of tensors, the first of which has a gradient, and a function that makes them for a number of atoms."""


def contracted(device: torch.device) -> Made:
    monomials = [(0,), (1,), (0, 1), (1, 1), (0, 1, 2), (2, 2, 2)]
    polynomial = contraction.Polynomial.make(3, 2, [(m, o) for m in monomials for o in range(2)])
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(2, len(polynomial.terms), CHANNELS, generator=generator).to(device)
    polynomial.tables(device)

    def inputs(atoms: int) -> list[Tensor]:
        x = torch.randn(atoms, 3, CHANNELS, generator=generator)
        return [x.to(device), (torch.arange(atoms) % 2).to(device), coefficients]

    return lambda x, species, c: contraction.contraction(polynomial, x, species, c), inputs


def rounded(device: torch.device) -> Made:
    layout = ((1, 1), (1, 3), (1, 5))
    quantizer = FeatureQuantizer(
        FeatureLayout(tuple((CHANNELS, d) for _, d in layout)), ScalarConfig(), VectorConfig(frame="local"), 1.0
    )
    quantizer.differentiable_twice = False
    pieces, row = [], 0
    for _, d in layout:
        pieces.append(rounding.Piece(d, CHANNELS, row * CHANNELS, 9 * CHANNELS, CHANNELS))
        row += d
    plan = rounding.plan(quantizer, pieces)
    assert plan is not None
    plan.tables(device)
    assert plan.summary[2] == 9 * CHANNELS
    generator = torch.Generator().manual_seed(1)
    return (
        lambda x: rounding.round_features(x, plan, x.shape[0]),
        lambda atoms: [torch.randn(atoms, 9, CHANNELS, generator=generator).to(device)],
    )


def mixed(bits: int, top: int) -> Callable[[torch.device], Made]:
    def make(device: torch.device) -> Made:
        generator = torch.Generator().manual_seed(2)
        codes = torch.randint(-8, 8, (40, 12), generator=generator, dtype=torch.int8)
        stored = (pack_int4(codes) if bits == 4 else codes).to(device)
        scale = (torch.rand(1, 12, generator=generator) + 0.5).to(device)
        return (
            lambda x, residual, c, s: linear.linear(x, c, s, residual, top),
            lambda atoms: [
                torch.randn(atoms, 40, generator=generator).to(device),
                torch.randn(atoms, 12, generator=generator).to(device),
                stored,
                scale,
            ],
        )

    return make


KINDS = {
    "contraction": (contracted, "contraction_gpu", "contraction_backward_gpu"),
    "rounding": (rounded, "round_features_gpu", None),
    "linear": (mixed(8, 32639), "linear_gpu", "linear_backward_gpu"),
    "linear of four bits, float features": (mixed(4, 0), "linear_gpu", "linear_backward_gpu"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_graph_serves_any_number_of_atoms(kind: str, device: torch.device) -> None:
    make, forward, backward = KINDS[kind]
    operation, inputs = make(device)

    def step(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = operation(x, *others)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        return out.detach(), grad

    # Tables that the operation holds itself are constants of the graph.
    graph = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs(5))
    names = [str(node.target) for node in graph.graph.nodes]
    for name in (forward, backward):
        assert name is None or sum(f"gaq.{name}." in target for target in names) == 1, names
    for atoms in (5, 3, 17):
        given = inputs(atoms)
        for ours, theirs in zip(graph(*given), step(*given), strict=True):
            assert float(theirs.abs().max()) > 0.0
            assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_compiled_without_a_break(kind: str, dynamic: bool, device: torch.device) -> None:
    operation, inputs = KINDS[kind][0](device)
    torch.compiler.reset()
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for atoms in (5, 7):
        given = inputs(atoms)
        results = []
        for function in (compiled, operation):
            x = given[0].detach().requires_grad_()
            out = function(x, *given[1:])
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
    torch.compiler.reset()


EXPORTED = """
import torch
from torch._functorch.aot_autograd import aot_export_module
from gaq.kernels import contraction
from gaq.kernels.gpu import contraction as contractions, linear, rounding

polynomial = contraction.Polynomial.make(2, 1, [((0, 1), 0)])
values, derivative, heads = polynomial.tables(torch.device("cpu"))


class Module(torch.nn.Module):
    def forward(self, x, species, coefficients, ints, tops, mixing, codes, scale, values, derivative):
        x = contractions.contraction(x, species, coefficients, (values, derivative, heads), 1)
        x = rounding.round_op(x, ints, tops, mixing, x.shape[0], 0, False, 4)
        return (linear.linear(x[:, 0], codes, scale, None, 8355711, 0),)


inputs = [torch.ones(3, 2, 4), torch.zeros(3, dtype=torch.int64), torch.ones(1, 1, 4)]
inputs += [torch.ones(1, 8, dtype=torch.int64), torch.ones(1, dtype=torch.float64), torch.ones(1, 1).double()]
inputs += [torch.ones(4, 5, dtype=torch.int8), torch.ones(1, 5), values, derivative]
exported, _ = aot_export_module(Module(), inputs, trace_joint=False)
print(sum("triton_kernel_wrapper" in str(node.target) for node in exported.graph.nodes))
"""


def test_compilers_see_the_kernels(tmp_path: Path) -> None:
    assert printed(EXPORTED, tmp_path) == ["3"]
