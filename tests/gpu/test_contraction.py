"""The Triton contraction against the reference in float64, over random polynomials."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq.kernels import contraction

gpu_contraction = pytest.importorskip(
    "gaq.kernels.gpu.contraction", reason="needs Triton: pip install '.[gpu]'", exc_type=ImportError
)


@st.composite
def polynomials(draw: Any) -> tuple[contraction.Polynomial, int]:
    rows_in, rows_out = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    monomial = st.lists(st.integers(0, rows_in - 1), min_size=1, max_size=4).map(lambda m: tuple(sorted(m)))
    occurring = draw(st.lists(st.tuples(monomial, st.integers(0, rows_out - 1)), min_size=1, max_size=10))
    return contraction.Polynomial.make(rows_in, rows_out, occurring), draw(st.integers(0, 2**31))


@settings(max_examples=12, deadline=None)
@given(
    drawn=polynomials(),
    atoms=st.integers(0, 7),
    channels=st.sampled_from([1, 7, 8, 20]),
    species=st.integers(1, 4),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_contraction_is_the_reference(
    device: torch.device,
    drawn: tuple[contraction.Polynomial, int],
    atoms: int,
    channels: int,
    species: int,
    dtype: torch.dtype,
) -> None:
    polynomial, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    # Channels before rows in memory: not contiguous.
    wide = torch.randn(atoms, channels, polynomial.rows_in, generator=generator, dtype=torch.float64)
    features = wide.transpose(1, 2)
    kinds = torch.randint(0, species, (2 * atoms,), generator=generator)[::2]
    coefficients = torch.randn(species, len(polynomial.terms), channels, generator=generator, dtype=torch.float64)
    results = []
    cpu = torch.device("cpu")
    for function, kind, place in (
        (contraction.contraction, dtype, device),
        (contraction.reference, torch.float64, cpu),
    ):
        x = features.detach().to(place, kind).requires_grad_()
        out = function(polynomial, x, kinds.to(place), coefficients.to(place, kind))
        probe = torch.linspace(-1.0, 1.0, out.numel(), dtype=kind).view(out.transpose(1, 2).shape).transpose(1, 2)
        (grad,) = torch.autograd.grad((out * probe.to(place)).sum(), [x])
        results.append([t.detach().cpu().double() for t in (out, grad)])
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for ours, theirs in zip(*results, strict=True):
        scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


def cubic(channels: int, device: torch.device) -> tuple[contraction.Polynomial, torch.Tensor]:
    """All monomials up to degree 3 of three features, in two outputs; two species."""
    monomials = [m for n in (1, 2, 3) for m in _sorted_tuples(n, 3)]
    polynomial = contraction.Polynomial.make(3, 2, [(m, o) for m in monomials for o in range(2)])
    generator = torch.Generator().manual_seed(0)
    shape = (2, len(polynomial.terms), channels)
    return polynomial, torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def _sorted_tuples(degree: int, rows: int, least: int = 0) -> list[tuple[int, ...]]:
    if degree == 0:
        return [()]
    return [(m, *rest) for m in range(least, rows) for rest in _sorted_tuples(degree - 1, rows, m)]


def test_every_element_is_written(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *shape: int, **options: Any) -> torch.Tensor:
        tensor = usual(self, *shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    # A tile of two atoms and four channels, so that the last tile is not full in either direction.
    monkeypatch.setattr(gpu_contraction, "blocks", lambda atoms, channels: (2, 4))
    # The last output and the last feature occur in no term.
    polynomial = contraction.Polynomial.make(3, 3, [((0, 1), 0), ((0,), 1)])
    x = torch.randn(5, 3, 7, dtype=torch.float64, device=device, requires_grad=True)
    coefficients = torch.randn(1, 2, 7, dtype=torch.float64, device=device)
    species = torch.zeros(5, dtype=torch.int64, device=device)
    out = contraction.contraction(polynomial, x, species, coefficients)
    torch.testing.assert_close(out, contraction.reference(polynomial, x, species, coefficients))
    assert bool((out[:, 2] == 0).all())
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert bool(grad.isfinite().all())
    assert bool((grad[:, 2] == 0).all())


def test_the_gradient_is_that_of_an_energy(device: torch.device) -> None:
    """The derivative of the gradient, by central differences of the kernel's gradient, is symmetric."""
    polynomial, coefficients = cubic(2, device)
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(3, 2, generator=generator, dtype=torch.float64).to(device)
    probe = torch.randn(2, 2, generator=generator, dtype=torch.float64).to(device)
    step = 1e-4
    # An atom for each displacement: row m is moved forwards in atom m, backwards in atom 3 + m, in both channels.
    shift = step * torch.eye(3, dtype=torch.float64, device=device)[:, :, None]
    x = torch.cat([centre + shift, centre - shift]).requires_grad_()
    out = contraction.contraction(polynomial, x, torch.ones(6, dtype=torch.int64, device=device), coefficients)
    (grad,) = torch.autograd.grad((out * probe).sum(), x)
    jacobian = (grad[:3] - grad[3:]) / (2 * step)
    assert float(jacobian.abs().max()) > 1.0
    torch.testing.assert_close(jacobian, jacobian.transpose(0, 1), rtol=0, atol=1e-8 * float(jacobian.abs().max()))


def test_species_that_do_not_exist(device: torch.device) -> None:
    polynomial, coefficients = cubic(3, torch.device("cpu"))
    x = torch.ones(3, 3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="species outside 0 to 1"):
        contraction.contraction(polynomial, x, torch.tensor([0, 2, 1]), coefficients)
    # On a GPU nothing checks them beforehand.
    x, coefficients, species = x.to(device), coefficients.to(device), torch.tensor([0, 2, -1], device=device)
    out = gpu_contraction.contraction(x, species, coefficients, polynomial.tables(x.device), 2)
    assert bool(out[0].isfinite().all())
    assert bool(out[1:].isnan().all())


def test_tables_are_made_once_and_gradients_once_only(device: torch.device) -> None:
    polynomial, coefficients = cubic(3, device)
    x = torch.ones(2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    species = torch.zeros(2, dtype=torch.int64, device=device)
    out = contraction.contraction(polynomial, x, species, coefficients)
    assert polynomial.tables(x.device) is polynomial.tables(x.device)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient by the coefficients"):
        torch.autograd.grad(
            contraction.contraction(polynomial, x, species, coefficients.requires_grad_()).sum(), coefficients
        )


def test_polynomials_too_large_for_the_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="degree 4"):
        gpu_contraction.value_table(1, ((0, 0, 0, 0, 0),), ((0, 0),))
    with pytest.raises(ValueError, match="128 rows"):
        gpu_contraction.value_table(1, ((200,),), ((0, 0),))
