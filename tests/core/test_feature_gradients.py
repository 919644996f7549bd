"""Gradients of rounded features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from features import (
    LAYOUTS,
    PATHS,
    SCHEMES,
    VECTORS,
    make,
    random_features,
    split,
)
from torch import Tensor

from gaq.quantizers.features import FeatureLayout


@LAYOUTS
@PATHS
def test_saturated_scalars_and_components_have_no_gradient(layout: FeatureLayout, plain: bool) -> None:
    quantizer = make(layout, {"scheme": "components", "magnitude_bits": 8}, {"bits": 8}, 1.0, plain)
    x = random_features(layout, dtype=torch.float64).requires_grad_()
    upstream = random_features(layout, dtype=torch.float64, seed=1)
    (gradient,) = torch.autograd.grad((quantizer(x) * upstream).sum(), x)
    inside = x.detach().abs() <= 1.0
    assert inside.any()
    assert not inside.all()
    assert torch.allclose(gradient, upstream * inside, rtol=1e-12, atol=0)


@LAYOUTS
@PATHS
@pytest.mark.parametrize(
    "vectors", [v for v in VECTORS if "scheme" not in v], ids=lambda v: "-".join(map(str, v.values()))
)
def test_vector_gradient_is_straight_through_on_the_sphere(
    layout: FeatureLayout, plain: bool, vectors: dict[str, Any]
) -> None:
    # u_q u^T + (m_q / m) (1 - u u^T); past the range the magnitude does not answer, and the first term is absent.
    quantizer = make(layout, vectors, limit=2.0, plain=plain)
    x = random_features(layout, dtype=torch.float64).requires_grad_()
    upstream = random_features(layout, dtype=torch.float64, seed=1)
    rounded = quantizer(x)
    (gradient,) = torch.autograd.grad((rounded * upstream).sum(), x)
    counts = {True: 0, False: 0}
    pieces = (split(layout, tensor) for tensor in (x.detach(), rounded.detach(), upstream, gradient))
    for v, v_q, up, got in zip(*pieces, strict=True):
        if v.shape[-1] == 1:
            continue
        m, m_q = v.norm(dim=-1, keepdim=True), v_q.norm(dim=-1, keepdim=True)
        u, u_q = v / m, v_q / m_q
        inside = m <= 2.0
        identity = torch.eye(v.shape[-1], dtype=torch.float64)
        along = u.unsqueeze(-1) * u.unsqueeze(-2)
        radial = inside.unsqueeze(-1) * u_q.unsqueeze(-1) * u.unsqueeze(-2)
        jacobian = radial + (m_q / m).unsqueeze(-1) * (identity - along)
        expected = (up.unsqueeze(-2) @ jacobian).squeeze(-2)
        present = m_q.squeeze(-1) > 0
        assert torch.allclose(got[present], expected[present], rtol=1e-9, atol=1e-12)
        for side in counts:
            counts[side] += int((present & (inside.squeeze(-1) == side)).sum())
        # Past the range, stretching a vector changes nothing.
        radial = (got * u).sum(-1, keepdim=True)[~inside]
        assert torch.allclose(radial, torch.zeros_like(radial), atol=1e-12)
    assert min(counts.values()) > 50


@LAYOUTS
@PATHS
@SCHEMES
def test_second_derivatives_are_finite(layout: FeatureLayout, plain: bool, vectors: dict[str, Any]) -> None:
    quantizer = make(layout, vectors, {"bits": 8}, 1.5, plain)
    x = random_features(layout, 40)
    x[::5] = 0.0
    x.requires_grad_()
    mixing = torch.randn(x[0].numel(), 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    energy = torch.tanh(quantizer(x).flatten(1) @ mixing).square().sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    for gradient in torch.autograd.grad(force.square().sum(), (x, mixing)):
        assert gradient.isfinite().all()
        assert gradient.any()


@LAYOUTS
@PATHS
@pytest.mark.parametrize("vectors", [{}, {"scheme": "components"}], ids=["mddq", "components"])
def test_second_derivatives_are_those_of_the_smooth_function(
    layout: FeatureLayout, plain: bool, vectors: dict[str, Any]
) -> None:
    # Fine rounding stands for the identity, whose second derivative is zero.
    quantizer = make(layout, vectors, limit=5.0, plain=plain)
    x = random_features(layout, 20, torch.float64).requires_grad_()
    mixing = 0.2 * torch.randn(x[0].numel(), 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    probe = random_features(layout, 20, torch.float64, seed=3)

    def hessian_product(y: Tensor) -> Tensor:
        energy = torch.tanh(y.flatten(1) @ mixing).square().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return torch.autograd.grad((force * probe).sum(), x)[0]

    expected = hessian_product(x * 1.0)
    assert (hessian_product(quantizer(x)) - expected).norm() / expected.norm() < 2e-3


@LAYOUTS
@PATHS
@SCHEMES
def test_gradients_of_many_directions_at_once(layout: FeatureLayout, plain: bool, vectors: dict[str, Any]) -> None:
    # As for a Hessian by rows.
    quantizer = make(layout, vectors, plain=plain)
    x = random_features(layout, 3).requires_grad_()
    rounded = quantizer(x)
    upstream = torch.stack([random_features(layout, 3, seed=seed) for seed in (1, 2)])
    (batched,) = torch.autograd.grad(rounded, x, upstream, is_grads_batched=True, retain_graph=True)
    for single_upstream, together in zip(upstream, batched, strict=True):
        (single,) = torch.autograd.grad(rounded, x, single_upstream, retain_graph=True)
        assert torch.allclose(single, together, rtol=1e-5, atol=1e-6)
