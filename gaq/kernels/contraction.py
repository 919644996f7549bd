r"""Polynomials of an atom's features with coefficients for each species and channel.

The symmetric contraction of MACE is

.. math:: A_i^{o c} = \sum_\nu \sum_k w^{(\nu)}_{z_i k c} \sum_{m_1 \dots m_\nu} U^{(\nu)}_{o\, m_1 \dots m_\nu\, k}
    x_i^{m_1 c} \cdots x_i^{m_\nu c}

U is symmetric in its m and nearly empty (99.6 % zeros for l = 3, correlation 3). Folding the weights into U and summing
equal monomials leaves one coefficient for each species, channel, output and monomial that occurs. The monomials form a
tree, in which each is its parent times one more feature; the derivative walks the tree backwards.

`reference` is the same in plain torch; the tests compare with it in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gaq.kernels import gpu
from gaq.kernels.cpu.native import kernel, refuse_second_derivative
from gaq.kernels.gpu.tracing import has_data

__all__ = ["Polynomial", "contraction", "fold", "reference"]


@dataclass(frozen=True)
class Polynomial:
    """Monomials that occur in the outputs.

    Attributes:
        rows_in: number of features.
        rows_out: number of outputs.
        monomials: sorted tuples of feature numbers, parents before children.
        terms: (number of the monomial, output), ordered by monomial.
        plan: the tree as the C++ code reads it, without its first word, the number of channels.
    """

    rows_in: int
    rows_out: int
    monomials: tuple[tuple[int, ...], ...]
    terms: tuple[tuple[int, int], ...]
    plan: Tensor
    # Plain dictionaries, because compilers trace through them: one entry for each device and number of channels in use.
    # Threads that write at the same time write the same value.
    _tables: dict[torch.device, tuple[Tensor, Tensor, list[int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _plans: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def plan_of(self, channels: int) -> Tensor:
        """The plan for a number of channels, which it begins with; made once."""
        if channels not in self._plans:
            self._plans[channels] = torch.cat([torch.tensor([channels]), self.plan])
        return self._plans[channels]

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
        """Tables that the GPU kernel reads, copied to a device once."""
        if device not in self._tables:
            from gaq.kernels.gpu import contraction as gpu_contraction

            value = gpu_contraction.value_table(self.rows_out, self.monomials, self.terms)
            derivative = gpu_contraction.derivative_table(self.rows_in, self.monomials, self.terms)
            heads = gpu_contraction.heads_of(value, derivative)
            self._tables[device] = (value.to(device), derivative.to(device), heads)
        return self._tables[device]

    @classmethod
    def make(cls, rows_in: int, rows_out: int, occurring: list[tuple[tuple[int, ...], int]]) -> Polynomial:
        """Make a polynomial from the (monomial, output) pairs that occur, in any order."""
        with_parents = {monomial for monomial, _ in occurring}
        for monomial in list(with_parents):
            with_parents.update(monomial[:k] for k in range(1, len(monomial)))
        # In sorted order a tuple comes right after its own beginnings, so the walk is depth first.
        monomials = tuple(sorted(with_parents))
        number = {monomial: i for i, monomial in enumerate(monomials)}
        terms = tuple(sorted({(number[monomial], output) for monomial, output in occurring}))
        parents = {monomial[:-1] for monomial in monomials if len(monomial) > 1}
        slots = {monomial: i for i, monomial in enumerate(sorted(parents))}
        ints = [rows_in, rows_out, len(monomials), len(terms), len(slots)]
        at = 0
        for i, monomial in enumerate(monomials):
            end = at
            while end < len(terms) and terms[end][0] == i:
                end += 1
            parent = slots[monomial[:-1]] if len(monomial) > 1 else -1
            ints += [parent, monomial[-1], slots.get(monomial, -1), at, end]
            at = end
        ints += [output for _, output in terms]
        return cls(rows_in, rows_out, monomials, terms, torch.tensor(ints, dtype=torch.int64))


def fold(tensors: list[tuple[Tensor, Tensor, int]], rows_in: int, rows_out: int) -> tuple[Polynomial, Tensor]:
    """Fold weights into coupling tensors.

    Args:
        tensors: for each output block and degree the coupling tensor (components, rows_in, ..., rows_in, paths), the
            weights (species, paths, channels), and the number of the block's first output.
        rows_in: number of features.
        rows_out: number of outputs.

    Returns:
        The polynomial and its coefficients, shape (species, terms, channels), float64.
    """
    gathered: dict[tuple[tuple[int, ...], int], Tensor] = {}
    for tensor, weights, start in tensors:
        tensor, weights = tensor.detach().double(), weights.detach().double()
        entries: dict[tuple[tuple[int, ...], int], Tensor] = {}
        for index in tensor.abs().sum(-1).nonzero().tolist():
            key = (tuple(sorted(index[1:])), start + index[0])
            row = tensor[tuple(index)]
            entries[key] = entries[key] + row if key in entries else row.clone()
        if not entries:
            continue
        folded = torch.einsum("tk,zkc->tzc", torch.stack(list(entries.values())), weights)
        for key, value in zip(entries, folded, strict=True):
            gathered[key] = gathered[key] + value if key in gathered else value
    # In the sum over equal monomials some couplings cancel, up to rounding.
    largest = max((float(v.abs().max()) for v in gathered.values()), default=0.0)
    gathered = {key: value for key, value in gathered.items() if float(value.abs().max()) > 1e-14 * largest}
    polynomial = Polynomial.make(rows_in, rows_out, list(gathered))
    ordered = [gathered[polynomial.monomials[monomial], output] for monomial, output in polynomial.terms]
    return polynomial, torch.stack(ordered, dim=1)


class _Contraction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]  # torch declares *args
        ctx: torch.autograd.function.FunctionCtx, features: Tensor, species: Tensor, coefficients: Tensor, plan: Tensor
    ) -> Tensor:
        features = features.contiguous()
        output = features.new_empty(features.shape[0], int(plan[2]), features.shape[2])
        kernel("contraction", features.dtype)(
            plan.data_ptr(),
            features.shape[0],
            species.data_ptr(),
            features.data_ptr(),
            coefficients.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(features, species, coefficients, plan)
        return output

    @staticmethod
    def backward(  # type: ignore[override]  # torch declares *args
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        features, species, coefficients, plan = ctx.saved_tensors  # type: ignore[attr-defined]  # not in torch's stub
        grad = grad.contiguous()
        grad_features = torch.empty_like(features)
        kernel("contraction_backward", features.dtype)(
            plan.data_ptr(),
            features.shape[0],
            species.data_ptr(),
            features.data_ptr(),
            coefficients.data_ptr(),
            grad.data_ptr(),
            grad_features.data_ptr(),
            torch.get_num_threads(),
        )
        return grad_features, None, None, None


def _check(polynomial: Polynomial, features: Tensor, species: Tensor, coefficients: Tensor) -> None:
    if features.dim() != 3 or features.shape[1] != polynomial.rows_in or species.shape != features.shape[:1]:
        raise ValueError(f"features of shape (atoms, {polynomial.rows_in}, channels), not {tuple(features.shape)}")
    if coefficients.shape[1:] != (len(polynomial.terms), features.shape[2]):
        raise ValueError(
            f"coefficients of shape (species, {len(polynomial.terms)}, {features.shape[2]}), "
            f"not {tuple(coefficients.shape)}"
        )
    if features.dtype != coefficients.dtype or species.dtype != torch.int64:
        raise TypeError(f"dtypes do not fit: {features.dtype}, {coefficients.dtype}, {species.dtype}")
    # On a GPU the host would have to wait for the values; the kernel there gives NaN for an unknown species.
    readable = species.device.type == "cpu" and has_data(species) and species.numel() > 0
    if readable and not 0 <= int(species.min()) <= int(species.max()) < coefficients.shape[0]:
        raise ValueError(f"species outside 0 to {coefficients.shape[0] - 1}")


def contraction(polynomial: Polynomial, features: Tensor, species: Tensor, coefficients: Tensor) -> Tensor:
    """Compute the polynomials of all atoms by the C++ or Triton kernel; differentiable once, by the features.

    Args:
        polynomial: the monomials.
        features: (atoms, rows_in, channels).
        species: (atoms,), int64.
        coefficients: (species, terms, channels), contiguous, in the dtype of the features.

    Returns:
        (atoms, rows_out, channels).

    Raises:
        ValueError, TypeError: for shapes, species and dtypes that do not fit.
        gaq.kernels.cpu.native.CompilerError: if the kernels cannot be built.
    """
    _check(polynomial, features, species, coefficients)
    if gpu.chosen(features.device):
        from gaq.kernels.gpu import contraction as gpu_contraction

        tables = polynomial.tables(features.device)
        return gpu_contraction.contraction(features, species, coefficients, tables, polynomial.rows_out)
    plan = polynomial.plan_of(features.shape[2])
    species, coefficients = species.contiguous(), coefficients.contiguous()
    return _Contraction.apply(features, species, coefficients, plan)  # type: ignore[no-any-return]  # untyped in torch


def reference(polynomial: Polynomial, features: Tensor, species: Tensor, coefficients: Tensor) -> Tensor:
    """Compute `contraction` in plain torch, differentiable any number of times."""
    _check(polynomial, features, species, coefficients)
    values: dict[tuple[int, ...], Tensor] = {}
    for monomial in polynomial.monomials:
        feature = features[:, monomial[-1]]
        values[monomial] = values[monomial[:-1]] * feature if len(monomial) > 1 else feature
    output = [features.new_zeros(features.shape[0], features.shape[2]) for _ in range(polynomial.rows_out)]
    of_atoms = coefficients[species]
    for t, (monomial_number, row) in enumerate(polynomial.terms):
        output[row] = output[row] + of_atoms[:, t] * values[polynomial.monomials[monomial_number]]
    return torch.stack(output, dim=1)
