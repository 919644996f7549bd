"""Fused equivariant convolution on a GPU: `gaq.kernels.convolution` in Triton, in the same layouts.

The kernels are generated for each problem (`gaq.kernels.gpu.convolution_source`). A program sums over the edges of one
atom, so nothing with a row for each edge and channel is written and nothing is added by atomics: results are the same
from run to run. Edges are sorted by atom on the device, and the host does not wait for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path as File
from types import ModuleType

from torch import Tensor

from gaq.caches import cached
from gaq.files.whole import written_whole
from gaq.kernels.cpu.native import refuse_second_derivative
from gaq.kernels.cpu.store import writable_folder
from gaq.kernels.gpu import tracing, why_not
from gaq.kernels.gpu.convolution_source import source
from gaq.kernels.problem import ConvolutionProblem, Graph
from gaq.untyped import Context

__all__ = ["convolution", "operation", "register", "source"]


@cached(most=64)
def _generated(key: str) -> ModuleType:
    """Import a module of generated kernels. Its file must exist: Triton reads the source of what it compiles."""
    path = _folder() / f"{key}.py"
    spec = importlib.util.spec_from_file_location(f"gaq.kernels.gpu.{key}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise RuntimeError(f"{path}: the file of generated kernels is gone; load the model again")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cached(most=1)
def _folder() -> File:
    """Folder of generated kernels, in that of compiled ones."""
    return writable_folder("triton")


def register(problem: ConvolutionProblem, tabulated: bool) -> str:
    """Write the kernels of a problem to the cache folder, unless they are there, and return their name.

    Raises:
        RuntimeError: where Triton kernels cannot run.
    """
    if tabulated not in problem.sources:
        reason = why_not()
        if reason is not None:
            raise RuntimeError(reason)
        text = source(problem, tabulated)
        key = f"convolution_{hashlib.sha256(text.encode()).hexdigest()[:20]}"
        path = _folder() / f"{key}.py"
        if not path.exists():
            # Processes that start together must not read half a file.
            with written_whole(path) as part:
                part.write_text(text)
        problem.sources[tabulated] = key
    return problem.sources[tabulated]


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Memory that the kernels fill; tests fill it with NaN before."""
    return like.new_empty(shape)


@tracing.operation("gaq::edge_convolution_triton", mutates_args=())
def operation(
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tables: Tensor | None,
    scales: Tensor | None,
    first: Tensor,
    edges: Tensor,
    first_sent: Tensor | None,
    edges_sent: Tensor | None,
    key: str,
) -> Tensor:
    """Compute the messages, (rows_out * receivers, channels).

    Args:
        features, vectors, weights: as `gaq.kernels.convolution.convolution` takes them.
        tables: number of each edge's radial table; None where there is one table.
        scales: factors of the radial weights of each edge; None where there are none.
        first, edges: edges by receiver; see `gaq.kernels.problem.neighbours`.
        first_sent, edges_sent: edges by sender, for the gradient by the features; None where it has none.
        key: name of the kernels; see `register`.
    """
    kernels = _generated(key)
    receivers = first.shape[0] - 1
    message = _empty(features, kernels.ROWS_OUT * receivers, kernels.CHANNELS)
    tracing.wrapped(kernels.gaq_convolution)[(receivers, kernels.BLOCKS, kernels.PARTS)](
        features,
        vectors,
        weights,
        first,
        edges[0],
        edges[1],
        first if tables is None else tables,
        weights if scales is None else scales,
        message,
        weights.shape[1],
        SEVERAL=tables is not None,
        num_warps=kernels.WARPS,
    )
    return message


@tracing.operation("gaq::edge_convolution_triton_backward", mutates_args=())
def _backward(
    grad: Tensor,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tables: Tensor | None,
    scales: Tensor | None,
    first: Tensor,
    edges: Tensor,
    of_features: bool,
    key: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients by features, vectors, weights and factors; empty where there is none."""
    kernels = _generated(key)
    count, receivers = vectors.shape[0], grad.shape[0] // kernels.ROWS_OUT
    grad_features = _empty(features, *features.shape) if of_features else _empty(features, 0)
    grad_weights = _empty(weights, *weights.shape) if weights.dim() == 3 else _empty(weights, 0)
    grad_scales = _empty(weights, 0) if scales is None else _empty(scales, *scales.shape)
    parts = _empty(vectors, kernels.BLOCKS, count, 3)
    kernel = kernels.gaq_convolution_backward_all if of_features else kernels.gaq_convolution_backward
    tracing.wrapped(kernel)[(first.shape[0] - 1, kernels.BLOCKS)](
        grad,
        features,
        vectors,
        weights,
        first,
        edges[0],
        edges[1],
        first if tables is None else tables,
        weights if scales is None else scales,
        grad_features,
        parts,
        grad_weights,
        grad_scales,
        count,
        receivers,
        weights.shape[1],
        SEVERAL=tables is not None,
        num_warps=kernels.WARPS,
    )
    return grad_features, parts.sum(0), grad_weights, grad_scales


def _setup(ctx: Context, inputs: tuple[object, ...], output: Tensor) -> None:
    *tensors, ctx.key = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    features, vectors, weights, tables, scales, first, edges, first_sent, edges_sent = ctx.saved_tensors
    of_features, _, of_weights = ctx.needs_input_grad[:3]
    if of_weights and weights.dim() == 4:
        raise RuntimeError("a radial table has no gradient")
    if of_features:
        first, edges = first_sent, edges_sent
    g_features, g_vectors, g_weights, g_scales = _backward(
        grad.contiguous(), features, vectors, weights, tables, scales, first, edges, of_features, ctx.key
    )
    return (
        g_features if of_features else None,
        g_vectors,
        g_weights if of_weights else None,
        None,
        None if scales is None else g_scales,
        *(None,) * 5,
    )


operation.register_autograd(_differentiate, setup_context=_setup)


def convolution(
    problem: ConvolutionProblem,
    graph: Graph,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tabulated: bool = True,
    scales: Tensor | None = None,
) -> Tensor:
    """Compute the messages of all receivers on a GPU; see `gaq.kernels.convolution.convolution`, which calls this."""
    atoms = features.shape[0]
    by_sender: Sequence[Tensor | None] = graph.by_sender(atoms) if features.requires_grad else (None, None)
    return operation(  # type: ignore[no-any-return]  # a registered operation is untyped
        features.contiguous(),
        vectors.contiguous(),
        weights.contiguous(),
        None if graph.tables is None else graph.tables.contiguous(),
        None if scales is None else scales.contiguous(),
        *graph.by_receiver(graph.received(atoms)),
        *by_sender,
        register(problem, tabulated),
    )
