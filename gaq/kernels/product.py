r"""Fused product of each edge's features with the features of its centre atom: Allegro's tensor product.

For edges e with centre a(e), features x of edges and y of atoms, path weights w and channels u,

.. math:: z_{e u k} = \sum_{i j} x_{e u i}\, y_{a(e) u j} \sum_p w_{u p}\, C^p_{i j k}
    = \sum_i x_{e u i} M_{a(e) u i k}

The matrix :math:`M_{a u i k} = \sum_{p j} w_{u p} C^p_{i j k} y_{a u j}` belongs to the atom and serves all its edges.
It is made once for each atom, from the non-zero coefficients. An edge then costs one small matrix product (our
derivation; plain code sums over i and j for every edge, 9 times as much at l <= 2). The derivative sums
:math:`\sum_e x_{e u i} g_{e u k}` over an atom's edges in cache, before it multiplies by the coefficients.

`reference` is the same in plain torch; the tests compare with it in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gaq.kernels.cpu import native
from gaq.kernels.cpu.native import kernel, refuse_second_derivative
from gaq.untyped import Context

__all__ = ["ProductProblem", "product", "reference"]


@dataclass(frozen=True)
class ProductProblem:
    """Coefficients of a product.

    Attributes:
        channels: number of channels, of edges and atoms.
        coefficients: (paths, components of edges, components of atoms, components out), float64.
        plan: the coefficients as the C++ code reads them, integers and reals.
    """

    channels: int
    coefficients: Tensor
    plan: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, channels: int, coefficients: Tensor) -> ProductProblem:
        """Make a problem from coefficients, (paths, components of edges, components of atoms, components out).

        Raises:
            ValueError: for coefficients of another shape.
        """
        if coefficients.dim() != 4:
            raise ValueError(f"coefficients of shape (paths, i, j, k), not {tuple(coefficients.shape)}")
        coefficients = coefficients.double().cpu()
        entries = coefficients.nonzero().tolist()
        # In the order of output components, so that the sum of a component stays in its register.
        pairs = sorted({(k, i) for _, i, _, k in entries})
        number = {pair: n for n, pair in enumerate(pairs)}
        paths, d1, d2, d3 = coefficients.shape
        ints = [channels, d1, d2, d3, paths, len(pairs), len(entries)]
        for k, i in pairs:
            ints += [i, k]
        for p, i, j, k in entries:
            ints += [p, j, number[k, i]]
        values = [float(coefficients[p, i, j, k]) for p, i, j, k in entries]
        plan = torch.tensor(ints, dtype=torch.int64), torch.tensor(values, dtype=torch.float64)
        return cls(channels, coefficients, plan)

    @property
    def rows_out(self) -> int:
        """Number of components of the result."""
        return int(self.coefficients.shape[3])


# Registered operations, so that graphs can be traced through them and compiled files can hold them (`shims.cpp`).


@native.operation("edge_product")
def _product(
    x: Tensor, y: Tensor, weights: Tensor, ints: Tensor, reals: Tensor, centre: Tensor, rows_out: int
) -> Tensor:
    out = x.new_empty(x.shape[0], x.shape[1], rows_out)
    # Bound to names, because copies of non-contiguous tensors have to live until the call returns.
    contiguous = [t.contiguous() for t in (ints, reals, centre, x, y, weights)]
    ints, reals, centre, x, y, weights = contiguous
    kernel("product", x.dtype)(
        ints.data_ptr(),
        reals.data_ptr(),
        y.shape[0],
        centre.numel(),
        centre.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        weights.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@_product.register_fake
def _product_fake(
    x: Tensor, y: Tensor, weights: Tensor, ints: Tensor, reals: Tensor, centre: Tensor, rows_out: int
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], rows_out)


@native.operation("edge_product_backward")
def _product_backward(
    grad: Tensor, x: Tensor, y: Tensor, weights: Tensor, ints: Tensor, reals: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor]:
    contiguous = [t.contiguous() for t in (ints, reals, centre, x, y, weights, grad)]
    ints, reals, centre, x, y, weights, grad = contiguous
    grad_x, grad_y = torch.empty_like(x), torch.empty_like(y)
    kernel("product_backward", x.dtype)(
        ints.data_ptr(),
        reals.data_ptr(),
        y.shape[0],
        centre.numel(),
        centre.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        weights.data_ptr(),
        grad.data_ptr(),
        grad_x.data_ptr(),
        grad_y.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_x, grad_y


@_product_backward.register_fake
def _product_backward_fake(
    grad: Tensor, x: Tensor, y: Tensor, weights: Tensor, ints: Tensor, reals: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _setup(ctx: Context, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])


def _differentiate(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    if ctx.needs_input_grad[2]:
        raise RuntimeError("the path weights of the fused product have no gradient: it is for inference")
    g_x, g_y = _product_backward(grad.contiguous(), *ctx.saved_tensors)
    return g_x, g_y, *(None,) * 5


_product.register_autograd(_differentiate, setup_context=_setup)


def _check(problem: ProductProblem, x: Tensor, y: Tensor, weights: Tensor, centre: Tensor) -> None:
    paths, d1, d2, _ = problem.coefficients.shape
    expected = {
        "edge features": (x, (centre.numel(), problem.channels, d1)),
        "atom features": (y, (y.shape[0], problem.channels, d2)),
        "path weights": (weights, (problem.channels, paths)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} of shape {shape}, not {tuple(tensor.shape)}")
    if not x.dtype == y.dtype == weights.dtype:
        raise TypeError(f"dtypes differ: {x.dtype}, {y.dtype}, {weights.dtype}")


def product(problem: ProductProblem, x: Tensor, y: Tensor, weights: Tensor, centre: Tensor) -> Tensor:
    """Compute the products of all edges by the fused kernel; differentiable once, by the features.

    Args:
        problem: the coefficients.
        x: features of edges, (edges, channels, components).
        y: features of atoms, (atoms, channels, components).
        weights: of the paths, (channels, paths).
        centre: atom of each edge, (edges,), int64, in any order.

    Returns:
        (edges, channels, `ProductProblem.rows_out`).

    Raises:
        ValueError, TypeError: for shapes and dtypes that do not fit.
        gaq.kernels.cpu.native.CompilerError: if the kernels cannot be built.
    """
    _check(problem, x, y, weights, centre)
    return _product(  # type: ignore[no-any-return]  # a registered operation is untyped
        x, y, weights, *problem.plan, centre, problem.rows_out
    )


def reference(problem: ProductProblem, x: Tensor, y: Tensor, weights: Tensor, centre: Tensor) -> Tensor:
    """Compute `product` in plain torch, differentiable any number of times."""
    _check(problem, x, y, weights, centre)
    return torch.einsum("pijk,up,eui,euj->euk", problem.coefficients.to(x), weights, x, y[centre])
