r"""Fused equivariant convolution: gather, tensor product with radial weights, sum over neighbours.

For atoms i with neighbours j, features h, edge vectors r and paths p = (l1, l2, l3),

.. math:: m_i^{p, m_3, c} = \sum_{j} R_{pc}(|r_{ij}|) \sum_{m_1 m_2} C^p_{m_1 m_2 m_3} Y_{l_2 m_2}(\hat r_{ij})
    h_j^{m_1 c}

The matrix :math:`B^p_{m_3 m_1} = \sum_{m_2} C Y` of an edge does not depend on the channel c, so the loop over channels
is a run of fused multiply-adds (our derivation; cuEquivariance and OpenEquivariance fuse the same sums). The derivative
with respect to h and r needs, for each edge, the dot products over channels of the incoming gradient with R h: nothing
with one row an edge and channel is ever stored, and no two threads write to the same place.

Layouts, channels always last:

- node features: (atoms, rows, channels), the components of all input blocks one below the other;
- messages: one matrix for each output group, (atoms * (2 l3 + 1), paths of the group * channels), flattened and end to
  end in one tensor: ready for the linear layer that mixes the paths of a group;
- radial weights: `RadialTable.knots`, those of several tables one after the other, or one row an edge
  (edges, paths, channels), cutoff included.

`reference` is the same in plain torch, what the tests trust, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gaq.kernels import gpu, harmonics, radial
from gaq.kernels.native import kernel, refuse_second_derivative

__all__ = ["C_SHIMS", "ConvolutionProblem", "Graph", "Path", "convolution", "reference"]

MAX_L = 6
COMPONENTS = (1, 3, 5, 7, 9)


@dataclass(frozen=True)
class Path:
    """One path of the tensor product.

    Attributes:
        block: number of the input block.
        edge_degree: l of the spherical harmonic.
        group: number of the output group.
        coefficients: (2 l1 + 1, 2 l2 + 1, 2 l3 + 1), float64, normalisation of the path included.
    """

    block: int
    edge_degree: int
    group: int
    coefficients: Tensor


@dataclass(frozen=True)
class ConvolutionProblem:
    """What is convolved with what, apart from how.

    Attributes:
        channels: multiplicity of every block.
        blocks: l of each input block.
        groups: l of each output group.
        paths: in the order of the radial weights.
        harmonics: coefficients of the spherical harmonics, as `gaq.kernels.harmonics.fit` gives them.
        r_max: cutoff in Å.
    """

    channels: int
    blocks: tuple[int, ...]
    groups: tuple[int, ...]
    paths: tuple[Path, ...]
    harmonics: tuple[Tensor, ...]
    r_max: float
    plans: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)
    sources: dict[bool, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.harmonics) > MAX_L + 1:
            raise ValueError(f"spherical harmonics up to l = {MAX_L} are served, not {len(self.harmonics) - 1}")
        for path in self.paths:
            shape = (
                2 * self.blocks[path.block] + 1,
                2 * path.edge_degree + 1,
                2 * self.groups[path.group] + 1,
            )
            if tuple(path.coefficients.shape) != shape:
                raise ValueError(f"coefficients of shape {tuple(path.coefficients.shape)} for a path of shape {shape}")
            if shape[0] not in COMPONENTS or shape[2] not in COMPONENTS:
                raise ValueError(f"features up to l = {COMPONENTS[-1] // 2} are served, not a path of shape {shape}")

    @property
    def rows_in(self) -> int:
        """Components of all input blocks."""
        return sum(2 * l + 1 for l in self.blocks)  # noqa: E741

    def group_paths(self, group: int) -> list[int]:
        """Numbers of the paths that end in a group."""
        return [i for i, path in enumerate(self.paths) if path.group == group]

    def group_rows(self) -> list[int]:
        """Rows of `channels` numbers that each group has for one atom."""
        return [len(self.group_paths(g)) * (2 * l + 1) for g, l in enumerate(self.groups)]  # noqa: E741

    @property
    def rows_out(self) -> int:
        """Rows of `channels` numbers that an atom's message has."""
        return sum(self.group_rows())

    def split(self, message: Tensor, atoms: int) -> list[Tensor]:
        """The matrices of the groups, (atoms * (2l+1), paths * channels), views of a message."""
        found, offset = [], 0
        for group, rows in enumerate(self.group_rows()):
            paths = len(self.group_paths(group))
            part = message[offset * atoms : (offset + rows) * atoms]
            found.append(part.reshape(-1, paths * self.channels))
            offset += rows
        return found

    def plan(self, knots: int) -> tuple[Tensor, Tensor]:
        """The problem as the C++ code reads it; `knots` is 0 for weights given an edge at a time."""
        if knots not in self.plans:
            starts = [sum(2 * l + 1 for l in self.blocks[:i]) for i in range(len(self.blocks))]  # noqa: E741
            rows = self.group_rows()
            offsets = [sum(rows[:g]) for g in range(len(rows))]
            indices: list[int] = []
            values: list[float] = []
            ints: list[int] = []
            for number, path in enumerate(self.paths):
                begin = len(values)
                for m1, m2, m3 in path.coefficients.nonzero().tolist():
                    indices += [m1, m2, m3]
                    values.append(float(path.coefficients[m1, m2, m3]))
                own = self.group_paths(path.group)
                ints += [starts[path.block], 2 * self.blocks[path.block] + 1, path.edge_degree]
                ints += [offsets[path.group], rows[path.group], own.index(number), len(own)]
                ints += [2 * self.groups[path.group] + 1, begin, len(values)]
            head = [self.channels, len(self.harmonics) - 1, len(self.paths), self.rows_in, knots, int(knots > 0)]
            reals = torch.cat(
                [
                    torch.tensor([self.r_max, *values], dtype=torch.float64),
                    *[c.double().flatten() for c in self.harmonics],
                ]
            )
            self.plans[knots] = torch.tensor([*head, len(values), *ints, *indices], dtype=torch.int64), reals
        return self.plans[knots]


@dataclass(frozen=True)
class Graph:
    """Who sends to whom.

    Attributes:
        sender: (edges,), int64, in the order of the edge vectors.
        receiver: the same.
        tables: number of the radial table of each edge, where there are several (they depend on the species of both
            atoms); None where there is one.
    """

    sender: Tensor
    receiver: Tensor
    tables: Tensor | None = None
    lists: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def by_receiver(self, atoms: int) -> tuple[Tensor, Tensor]:
        """`neighbours` of the receivers, made once."""
        return self._list("receiver", self.receiver, self.sender, atoms)

    def by_sender(self, atoms: int) -> tuple[Tensor, Tensor]:
        """The same of the senders."""
        return self._list("sender", self.sender, self.receiver, atoms)

    def _list(self, name: str, own: Tensor, other: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
        # Not by a key of both: where graphs are traced the number of atoms is a symbol, which has no hash.
        if name not in self.lists or self.lists[name][0].shape[0] != atoms + 1:
            self.lists[name] = neighbours(own, other, atoms)
        return self.lists[name]


def neighbours(own: Tensor, other: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
    """Edges by the atom they belong to, as the kernels on a card read them.

    Args:
        own: atom of each edge, (edges,).
        other: atom at its other end.
        atoms: number of atoms.

    Returns:
        Where each atom's edges begin, (atoms + 1,), and the numbers of the edges with their other ends, (2, edges),
        both int32. The order is stable, and nothing waits for the device.
    """
    ordered, order = torch.sort(own, stable=True)
    first = torch.searchsorted(ordered, torch.arange(atoms + 1, device=own.device, dtype=own.dtype))
    return first.to(torch.int32), torch.stack([order, other[order]]).to(torch.int32)


# Registered operations, so that graphs can be traced through them and compiled files can hold them (`shims.cpp`).


@torch.library.custom_op("gaq::edge_convolution", mutates_args=(), device_types="cpu")
def _convolution(
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    ints: Tensor,
    reals: Tensor,
    sender: Tensor,
    receiver: Tensor,
    tables: Tensor,
    rows_out: int,
) -> Tensor:
    atoms, channels = features.shape[0], features.shape[2]
    message = features.new_empty(rows_out * atoms, channels)
    # Copies of what is not contiguous have to live until the call is done.
    held = [t.contiguous() for t in (ints, reals, sender, receiver, tables, vectors, features, weights)]
    ints, reals, sender, receiver, tables, vectors, features, weights = held
    kernel("convolution", features.dtype)(
        ints.data_ptr(),
        reals.data_ptr(),
        atoms,
        sender.numel(),
        sender.data_ptr(),
        receiver.data_ptr(),
        tables.data_ptr() if tables.numel() else None,
        vectors.data_ptr(),
        features.data_ptr(),
        weights.data_ptr(),
        message.data_ptr(),
        torch.get_num_threads(),
    )
    return message


@_convolution.register_fake
def _convolution_fake(
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    ints: Tensor,
    reals: Tensor,
    sender: Tensor,
    receiver: Tensor,
    tables: Tensor,
    rows_out: int,
) -> Tensor:
    return features.new_empty(rows_out * features.shape[0], features.shape[2])


@torch.library.custom_op("gaq::edge_convolution_backward", mutates_args=(), device_types="cpu")
def _convolution_backward(
    grad: Tensor,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    ints: Tensor,
    reals: Tensor,
    sender: Tensor,
    receiver: Tensor,
    tables: Tensor,
    of_features: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    held = [t.contiguous() for t in (ints, reals, sender, receiver, tables, vectors, features, weights, grad)]
    ints, reals, sender, receiver, tables, vectors, features, weights, grad = held
    grad_features = torch.zeros_like(features) if of_features else features.new_empty(0)
    grad_vectors = torch.zeros_like(vectors)
    grad_weights = torch.zeros_like(weights) if of_weights else weights.new_empty(0)
    kernel("convolution_backward", features.dtype)(
        ints.data_ptr(),
        reals.data_ptr(),
        features.shape[0],
        sender.numel(),
        sender.data_ptr(),
        receiver.data_ptr(),
        tables.data_ptr() if tables.numel() else None,
        vectors.data_ptr(),
        features.data_ptr(),
        weights.data_ptr(),
        grad.data_ptr(),
        grad_vectors.data_ptr(),
        grad_features.data_ptr() if of_features else None,
        grad_weights.data_ptr() if of_weights else None,
        torch.get_num_threads(),
    )
    return grad_features, grad_vectors, grad_weights


@_convolution_backward.register_fake
def _convolution_backward_fake(
    grad: Tensor,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    ints: Tensor,
    reals: Tensor,
    sender: Tensor,
    receiver: Tensor,
    tables: Tensor,
    of_features: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_features = features.new_empty(features.shape) if of_features else features.new_empty(0)
    grad_weights = weights.new_empty(weights.shape) if of_weights else weights.new_empty(0)
    return grad_features, vectors.new_empty(vectors.shape), grad_weights


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    features, vectors, weights, *rest = ctx.saved_tensors
    of_features, _, of_weights = ctx.needs_input_grad[:3]
    if of_weights and weights.dim() == 4:
        raise RuntimeError("the knots of a radial table have no gradient")
    g_features, g_vectors, g_weights = _convolution_backward(
        grad.contiguous(), features, vectors, weights, *rest, of_features, of_weights or weights.dim() == 3
    )
    return (
        g_features if of_features else None,
        g_vectors,
        g_weights if of_weights else None,
        *(None,) * 6,
    )


_convolution.register_autograd(_differentiate, setup_context=_setup)


_TENSORS = "AtenTensorHandle features, AtenTensorHandle vectors, AtenTensorHandle weights, AtenTensorHandle ints, "
_TENSORS += "AtenTensorHandle reals, AtenTensorHandle sender, AtenTensorHandle receiver, AtenTensorHandle tables"

_SHIM = "AOTITorchError aoti_torch_cpu_edge_convolution"

C_SHIMS = {
    torch.ops.gaq.edge_convolution.default: [f"{_SHIM}({_TENSORS}, int64_t rows_out, AtenTensorHandle* ret0)"],
    torch.ops.gaq.edge_convolution_backward.default: [
        f"{_SHIM}_backward(AtenTensorHandle grad, {_TENSORS}, int32_t of_features, int32_t of_weights, "
        "AtenTensorHandle* ret0, AtenTensorHandle* ret1, AtenTensorHandle* ret2)"
    ],
}
"""For Inductor's option ``aot_inductor.custom_ops_to_c_shims``: what `shims.cpp` defines."""


def _check(problem: ConvolutionProblem, features: Tensor, vectors: Tensor, weights: Tensor, tabulated: bool) -> None:
    if features.shape[1:] != (problem.rows_in, problem.channels):
        raise ValueError(
            f"features of shape (atoms, {problem.rows_in}, {problem.channels}), not {tuple(features.shape)}"
        )
    last = (3, problem.channels) if tabulated else (len(problem.paths), problem.channels)
    paths = len(problem.paths)
    fits = weights.shape[0] > 0 and weights.shape[0] % paths == 0 if tabulated else len(weights) == len(vectors)
    if not fits or weights.shape[-2:] != last or weights.dim() != (4 if tabulated else 3):
        raise ValueError(f"radial weights of shape {tuple(weights.shape)} do not fit the problem")
    if not features.dtype == vectors.dtype == weights.dtype:
        raise TypeError(f"dtypes differ: {features.dtype}, {vectors.dtype}, {weights.dtype}")


def convolution(
    problem: ConvolutionProblem,
    graph: Graph,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tabulated: bool = True,
) -> Tensor:
    """The messages of all atoms, by the fused kernel; differentiable once.

    Args:
        problem: what is convolved.
        graph: the edges.
        features: (atoms, rows, channels).
        vectors: (edges, 3) from sender to receiver or back, as the harmonics want them, in Å. Edges of length
            zero, or of `r_max` and more, contribute nothing.
        weights: knots of a `RadialTable` (or of several, `Graph.tables` says whose), or (edges, paths, channels);
            contiguous in the dtype of the features.
        tabulated: which of the two.

    Returns:
        (rows_out * atoms, channels), see `ConvolutionProblem.split`.

    Raises:
        ValueError, TypeError: for shapes and dtypes that do not fit.
        gaq.kernels.native.CompilerError: where the kernels cannot be built.
        RuntimeError: on a card without Triton.
    """
    _check(problem, features, vectors, weights, tabulated)
    if gpu.chosen(features.device):
        from gaq.kernels.gpu import convolution as device

        return device.convolution(problem, graph, features, vectors, weights, tabulated)
    ints, reals = problem.plan(weights.shape[1] if tabulated else 0)
    return _convolution(  # type: ignore[no-any-return]
        features.contiguous(),
        vectors.contiguous(),
        weights.contiguous(),
        ints,
        reals,
        graph.sender.contiguous(),
        graph.receiver.contiguous(),
        graph.sender.new_empty(0) if graph.tables is None else graph.tables.contiguous(),
        problem.rows_out,
    )


def reference(
    problem: ConvolutionProblem,
    graph: Graph,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tabulated: bool = True,
) -> Tensor:
    """The same in plain torch, differentiable any number of times."""
    _check(problem, features, vectors, weights, tabulated)
    lengths = vectors.norm(dim=-1)
    inside = (lengths > 0) & (lengths < problem.r_max)
    numbers = inside.nonzero()[:, 0]
    vectors, lengths = vectors[numbers], lengths[numbers]
    sh = harmonics.evaluate(list(problem.harmonics), vectors / lengths[:, None])
    if not tabulated:
        w = weights[numbers]
    elif graph.tables is None:
        w = radial.evaluate(weights, lengths, problem.r_max)
    else:
        w = radial.evaluate_several(weights, lengths, problem.r_max, graph.tables[numbers], len(problem.paths))
    gathered = features[graph.sender[numbers]]
    starts = [sum(2 * l + 1 for l in problem.blocks[:i]) for i in range(len(problem.blocks))]  # noqa: E741
    parts: Sequence[list[Tensor]] = [[] for _ in problem.groups]
    for number, path in enumerate(problem.paths):
        begin = starts[path.block]
        x = gathered[:, begin : begin + 2 * problem.blocks[path.block] + 1]
        y = sh[:, path.edge_degree**2 : (path.edge_degree + 1) ** 2]
        edge = torch.einsum("xyz,exc,ey,ec->ezc", path.coefficients.to(x), x, y, w[:, number])
        summed = edge.new_zeros(features.shape[0], *edge.shape[1:]).index_add(0, graph.receiver[numbers], edge)
        parts[path.group].append(summed)
    # (atoms, components, paths, channels) of each group, flattened.
    groups = [torch.stack(own, dim=2).reshape(-1, problem.channels) for own in parts if own]
    return torch.cat(groups) if groups else features.new_zeros(0, problem.channels)
