r"""Fused equivariant convolution: gather, tensor product with radial weights, sum over neighbours.

For atoms i with neighbours j, features h, edge vectors r and paths p = (l1, l2, l3),

.. math:: m_i^{p, m_3, c} = \sum_{j} R_{pc}(|r_{ij}|) \sum_{m_1 m_2} C^p_{m_1 m_2 m_3} Y_{l_2 m_2}(\hat r_{ij})
    h_j^{m_1 c}

The matrix :math:`B^p_{m_3 m_1} = \sum_{m_2} C Y` of an edge does not depend on the channel c, so the loop over channels
is a series of fused multiply-adds (our derivation; cuEquivariance and OpenEquivariance fuse the same sums). The
derivative by h and r needs, for each edge, the dot products over channels of the incoming gradient with R h. Nothing
with a row for each edge and channel is stored, and no two threads write to the same place.

Layouts, channels always last:

- node features: (atoms, rows, channels), where the rows are the components of all input blocks, block after block;
- messages: a matrix for each output group, (atoms * (2 l3 + 1), paths of the group * channels), flattened and end to
  end in one tensor, ready for the linear layer that mixes the paths of a group;
- radial weights: `RadialTable.coefficients`, of several tables end to end, or a row for each edge, (edges, paths,
  channels), cutoff included.

`reference` is the same in plain torch; the tests compare with it in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gaq.kernels import gpu, harmonics, radial
from gaq.kernels.cpu import native
from gaq.kernels.cpu.native import kernel, refuse_second_derivative
from gaq.kernels.problem import ConvolutionProblem, Graph, Path, neighbours
from gaq.untyped import Context

__all__ = ["ConvolutionProblem", "Graph", "Path", "convolution", "neighbours", "reference"]

# Registered operations, so that graphs can be traced through them and compiled files can hold them (`shims.cpp`).


@native.operation("edge_convolution")
def _convolution(
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    scales: Tensor,
    ints: Tensor,
    reals: Tensor,
    sender: Tensor,
    receiver: Tensor,
    tables: Tensor,
    rows_out: int,
    receivers: int,
) -> Tensor:
    message = features.new_empty(rows_out * receivers, features.shape[2])
    # Bound to names, because copies of non-contiguous tensors have to live until the call returns.
    contiguous = [t.contiguous() for t in (ints, reals, sender, receiver, tables, vectors, features, weights, scales)]
    ints, reals, sender, receiver, tables, vectors, features, weights, scales = contiguous
    kernel("convolution", features.dtype)(
        ints.data_ptr(),
        reals.data_ptr(),
        features.shape[0],
        receivers,
        sender.numel(),
        sender.data_ptr(),
        receiver.data_ptr(),
        tables.data_ptr() if tables.numel() else None,
        vectors.data_ptr(),
        features.data_ptr(),
        weights.data_ptr(),
        scales.data_ptr() if scales.numel() else None,
        None,
        message.data_ptr(),
        torch.get_num_threads(),
    )
    return message


@_convolution.register_fake
def _convolution_fake(
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    scales: Tensor,
    ints: Tensor,
    reals: Tensor,
    sender: Tensor,
    receiver: Tensor,
    tables: Tensor,
    rows_out: int,
    receivers: int,
) -> Tensor:
    return features.new_empty(rows_out * receivers, features.shape[2])


@native.operation("edge_convolution_backward")
def _convolution_backward(
    grad: Tensor,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    scales: Tensor,
    ints: Tensor,
    reals: Tensor,
    sender: Tensor,
    receiver: Tensor,
    tables: Tensor,
    receivers: int,
    of_features: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    contiguous = [
        t.contiguous() for t in (ints, reals, sender, receiver, tables, vectors, features, weights, scales, grad)
    ]
    ints, reals, sender, receiver, tables, vectors, features, weights, scales, grad = contiguous
    grad_features = torch.zeros_like(features) if of_features else features.new_empty(0)
    grad_vectors = torch.zeros_like(vectors)
    grad_weights = torch.zeros_like(weights) if of_weights else weights.new_empty(0)
    grad_scales = torch.zeros_like(scales)
    kernel("convolution_backward", features.dtype)(
        ints.data_ptr(),
        reals.data_ptr(),
        features.shape[0],
        receivers,
        sender.numel(),
        sender.data_ptr(),
        receiver.data_ptr(),
        tables.data_ptr() if tables.numel() else None,
        vectors.data_ptr(),
        features.data_ptr(),
        weights.data_ptr(),
        scales.data_ptr() if scales.numel() else None,
        None,
        grad.data_ptr(),
        grad_vectors.data_ptr(),
        grad_features.data_ptr() if of_features else None,
        grad_weights.data_ptr() if of_weights else None,
        grad_scales.data_ptr() if scales.numel() else None,
        torch.get_num_threads(),
    )
    return grad_features, grad_vectors, grad_weights, grad_scales


@_convolution_backward.register_fake
def _convolution_backward_fake(
    grad: Tensor,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    scales: Tensor,
    ints: Tensor,
    reals: Tensor,
    sender: Tensor,
    receiver: Tensor,
    tables: Tensor,
    receivers: int,
    of_features: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_features = features.new_empty(features.shape) if of_features else features.new_empty(0)
    grad_weights = weights.new_empty(weights.shape) if of_weights else weights.new_empty(0)
    return grad_features, vectors.new_empty(vectors.shape), grad_weights, scales.new_empty(scales.shape)


def _setup(ctx: Context, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.receivers = inputs[10]


def _differentiate(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    features, vectors, weights, *rest = ctx.saved_tensors
    of_features, _, of_weights = ctx.needs_input_grad[:3]
    if of_weights and weights.dim() == 4:
        raise RuntimeError("a radial table has no gradient")
    g_features, g_vectors, g_weights, g_scales = _convolution_backward(
        grad.contiguous(),
        features,
        vectors,
        weights,
        *rest,
        ctx.receivers,
        of_features,
        of_weights or weights.dim() == 3,
    )
    return (
        g_features if of_features else None,
        g_vectors,
        g_weights if of_weights else None,
        g_scales,
        *(None,) * 7,
    )


_convolution.register_autograd(_differentiate, setup_context=_setup)


def _check(
    problem: ConvolutionProblem,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tabulated: bool,
    scales: Tensor | None,
) -> None:
    if features.shape[1:] != (problem.rows_in, problem.channels):
        raise ValueError(
            f"features of shape (atoms, {problem.rows_in}, {problem.channels}), not {tuple(features.shape)}"
        )
    last = (radial.COEFFICIENTS, problem.channels) if tabulated else (len(problem.paths), problem.channels)
    paths = len(problem.paths)
    fits = weights.shape[0] > 0 and weights.shape[0] % paths == 0 if tabulated else len(weights) == len(vectors)
    if not fits or weights.shape[-2:] != last or weights.dim() != (4 if tabulated else 3):
        raise ValueError(f"radial weights of shape {tuple(weights.shape)} do not fit the problem")
    if not features.dtype == vectors.dtype == weights.dtype:
        raise TypeError(f"dtypes differ: {features.dtype}, {vectors.dtype}, {weights.dtype}")
    expected = (len(vectors), problem.scales, problem.channels) if problem.scale_rows else None
    if (None if scales is None else scales.shape) != expected:
        raise ValueError(f"factors of edges of shape {expected}, not {None if scales is None else tuple(scales.shape)}")
    if scales is not None and scales.dtype != features.dtype:
        raise TypeError(f"dtypes differ: {features.dtype}, {scales.dtype}")


def convolution(
    problem: ConvolutionProblem,
    graph: Graph,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tabulated: bool = True,
    scales: Tensor | None = None,
) -> Tensor:
    """Compute the messages of all receivers by the fused kernel; differentiable once.

    Args:
        problem: the tensor product.
        graph: senders and receivers of the edges.
        features: of senders, (atoms, rows, channels).
        vectors: of edges, (edges, 3) in Å, from sender to receiver or back, in the direction that the harmonics expect.
            Edges of `r_max` or more contribute nothing. One of length zero has no direction: it makes the message of
            its receiver NaN, and its own gradient.
        weights: coefficients of a `RadialTable`, (paths, intervals, COEFFICIENTS, channels), or of several, end to end
            (`Graph.tables` numbers them), or weights of each edge, (edges, paths, channels); in the dtype of the
            features.
        tabulated: whether the weights are tables.

        scales: factors of the radial weights, different for each edge, (edges, scales, channels) with the rows that
            `ConvolutionProblem.scale_rows` numbers: the weights of attention. None where it is empty.

    Returns:
        (rows_out * receivers, channels), see `ConvolutionProblem.split`.

    Raises:
        ValueError, TypeError: for shapes and dtypes that do not fit.
        gaq.kernels.cpu.native.CompilerError: if the kernels cannot be built.
        RuntimeError: on a GPU without Triton.
    """
    _check(problem, features, vectors, weights, tabulated, scales)
    if gpu.chosen(features.device):
        from gaq.kernels.gpu import convolution as gpu_convolution

        return gpu_convolution.convolution(problem, graph, features, vectors, weights, tabulated, scales)
    ints, reals = problem.plan(weights.shape[1] if tabulated else 0)
    return _convolution(  # type: ignore[no-any-return]  # a registered operation is untyped
        features.contiguous(),
        vectors.contiguous(),
        weights.contiguous(),
        features.new_empty(0) if scales is None else scales.contiguous(),
        ints,
        reals,
        graph.sender.contiguous(),
        graph.receiver.contiguous(),
        graph.sender.new_empty(0) if graph.tables is None else graph.tables.contiguous(),
        problem.rows_out,
        graph.received(features.shape[0]),
    )


def reference(
    problem: ConvolutionProblem,
    graph: Graph,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tabulated: bool = True,
    scales: Tensor | None = None,
) -> Tensor:
    """Compute `convolution` in plain torch, differentiable any number of times."""
    _check(problem, features, vectors, weights, tabulated, scales)
    lengths = vectors.norm(dim=-1)
    numbers = (lengths < problem.r_max).nonzero()[:, 0]
    vectors, lengths = vectors[numbers], lengths[numbers]
    sh = harmonics.evaluate(list(problem.harmonics), vectors / lengths[:, None])
    if not tabulated:
        w = weights[numbers]
    elif graph.tables is None:
        w = radial.evaluate(weights, lengths, problem.r_max)
    else:
        w = radial.evaluate_several(weights, lengths, problem.r_max, graph.tables[numbers], len(problem.paths))
    if scales is not None:
        rows = [problem.scale_rows[path.block] for path in problem.paths]
        w = w * scales[numbers][:, rows]
    gathered, receivers = features[graph.sender[numbers]], graph.received(features.shape[0])
    starts = [sum(2 * l + 1 for l in problem.blocks[:i]) for i in range(len(problem.blocks))]  # noqa: E741
    parts: Sequence[list[Tensor]] = [[] for _ in problem.groups]
    for number, path in enumerate(problem.paths):
        begin = starts[path.block]
        x = gathered[:, begin : begin + 2 * problem.blocks[path.block] + 1]
        y = sh[:, path.edge_degree**2 : (path.edge_degree + 1) ** 2]
        edge = torch.einsum("xyz,exc,ey,ec->ezc", path.coefficients.to(x), x, y, w[:, number])
        summed = edge.new_zeros(receivers, *edge.shape[1:]).index_add(0, graph.receiver[numbers], edge)
        parts[path.group].append(summed)
    # (atoms, components, paths, channels) of each group, flattened.
    groups = [torch.stack(messages, dim=2).reshape(-1, problem.channels) for messages in parts if messages]
    return torch.cat(groups) if groups else features.new_zeros(0, problem.channels)
