"""Rounding of features in Triton against the quantizer itself."""

from __future__ import annotations

import pytest
import torch
from dependent_mixtures import nearly_dependent
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq.config.schema import ScalarConfig, VectorConfig
from gaq.kernels import rounding
from gaq.quantizers.features import FeatureLayout, FeatureQuantizer
from gaq.settings import override


def problem(
    channels: int, layout: tuple[tuple[int, int], ...], frame: str = "local"
) -> tuple[FeatureQuantizer, list[rounding.Piece], int]:
    """A quantizer, its pieces in (atoms, rows, channels), and the number of rows; negative pieces are copied."""
    quantizer = FeatureQuantizer(
        FeatureLayout(tuple((sign * channels, d) for sign, d in layout)), ScalarConfig(), VectorConfig(frame=frame), 1.0
    )
    quantizer.differentiable_twice = False
    pieces, row = [], 0
    total = sum(d for _, d in layout)
    for _, d in layout:
        pieces.append(rounding.Piece(d, channels, row * channels, total * channels, channels))
        row += d
    return quantizer, pieces, total


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    frame=st.sampled_from(["local", "fixed"]),
    channels=st.sampled_from([1, 5, 130]),
    layout=st.lists(st.tuples(st.sampled_from([1, 1, -1]), st.sampled_from([1, 3, 5, 7, 9])), min_size=1, max_size=2),
    atoms=st.integers(0, 2),
)
def test_rounding_is_the_quantizer(
    device: torch.device, seed: int, frame: str, channels: int, layout: list[tuple[int, int]], atoms: int
) -> None:
    # Scalars side by side are one irrep for the quantizer, so all of them are rounded or none.
    layout = sorted((1, d) if d == 1 else (s, d) for s, d in layout)
    layout.sort(key=lambda piece: piece[1])
    quantizer, pieces, total = problem(channels, tuple(layout), frame)
    plan = rounding.plan(quantizer, pieces)
    assert plan is not None
    generator = torch.Generator().manual_seed(seed)
    # Every other row of a larger tensor: not contiguous.
    x = torch.randn(2 * atoms, total, channels, generator=generator, dtype=torch.float64)[::2]
    expected = (rounding.reference(x, quantizer, pieces, atoms) if atoms else x).to(device)
    x = x.detach().to(device).requires_grad_()
    rounded = rounding.round_features(x, plan, atoms)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad((rounded * expected.detach()).sum(), x)
    torch.testing.assert_close(grad, expected.detach())


@pytest.mark.parametrize("frame", ["local", "fixed"])
def test_rounding_of_degenerate_atoms(device: torch.device, frame: str) -> None:
    layout = ((1, 1), (1, 1), (1, 3), (-1, 3), (1, 5), (1, 7))
    quantizer, pieces, total = problem(6, layout, frame)
    plan = rounding.plan(quantizer, pieces)
    assert plan is not None
    x = torch.randn(6, total, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] = 0.0
    x[2, 2:5] = 0.0
    x[3, 2:5, 1:] = 0.0  # one direction only: two axes are not spanned
    x[4, 2:5, 2:] = 0.0  # a plane
    x[5, 3:5] = 0.0  # along an axis of the laboratory: ties
    rounded = rounding.round_features(x.to(device), plan, 6).cpu()
    expected = rounding.reference(x, quantizer, pieces, 6)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-12)
    assert not torch.equal(rounded, x)
    assert torch.equal(rounded[:, 5:8], x[:, 5:8])
    assert bool((rounded[1] == 0).all())


@pytest.mark.parametrize("d", [3, 5])
def test_no_component_is_lost_where_mixtures_are_dependent(device: torch.device, d: int) -> None:
    quantizer, pieces, _ = problem(8, ((1, d),))
    plan = rounding.plan(quantizer, pieces)
    assert plan is not None
    for left in (0.0, 1e-7, 1e-5):
        x = nearly_dependent(d, 8, 1, left)[:6].transpose(1, 2).float().contiguous().to(device)
        rounded = rounding.round_features(x, plan, 6)
        assert (rounded - x).abs().max() < 1e-3 * float(x.abs().max())


@pytest.mark.smoke
def test_float32_is_the_cpu_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from gaq.kernels.cpu import native

    if not native.available():
        pytest.skip("needs a C++ compiler; `gaq doctor` says what is missing")
    quantizer, pieces, total = problem(32, ((1, 1), (1, 3), (1, 5), (1, 7)))
    plan = rounding.plan(quantizer, pieces)
    assert plan is not None
    x = torch.randn(4, total, 32, generator=torch.Generator().manual_seed(0))
    rounded = rounding.round_features(x.to(device), plan, 4).cpu()
    with override(kernels="auto"):
        expected = rounding.round_features(x, plan, 4)
    # The same codes, except for a few ties that rounding of the arithmetic decides; none is more than a step off.
    near = torch.isclose(rounded, expected, rtol=0, atol=2e-6)
    assert float(near.double().mean()) > 0.98
    torch.testing.assert_close(rounded, expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [17, 20, 22, 23, 24])
def test_scalars_of_any_width_are_those_of_the_quantizer(device: torch.device, bits: int, dtype: torch.dtype) -> None:
    """Bit for bit: nothing but a division and a product stands around the code."""
    quantizer = FeatureQuantizer(FeatureLayout(((37, 1),)), ScalarConfig(bits), VectorConfig(), 1.0)
    quantizer.differentiable_twice = False
    pieces = [rounding.Piece(1, 37, 0, 37, 37)]
    plan = rounding.plan(quantizer, pieces)
    assert plan is not None
    x = torch.randn(20, 37, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    x = (x * torch.logspace(-4, 4, 20)[:, None]).to(dtype)
    x[0] = 0.0
    rounded = rounding.round_features(x.to(device), plan, 20).cpu()
    assert torch.equal(rounded, rounding.reference(x, quantizer, pieces, 20))
    assert not torch.equal(rounded, x)


def test_every_element_is_written(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, pieces, total = problem(5, ((1, 1), (1, 3), (-1, 3), (1, 5)))
    plan = rounding.plan(quantizer, pieces)
    assert plan is not None
    assert plan.tables(device) is plan.tables(device)
    x = torch.randn(3, total, 5, dtype=torch.float64, device=device)
    usual = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **o: usual(t, **o).fill_(float("nan")))
    assert bool(rounding.round_features(x, plan, 3).isfinite().all())
    # Features that lie beyond the pieces are copied.
    wide = torch.cat([x.flatten(), torch.arange(7.0, dtype=torch.float64, device=device)])
    rounded = rounding.round_features(wide, plan, 3)
    assert torch.equal(rounded[-7:], wide[-7:])
    x[1, 0, 2] = float("nan")
    assert bool(rounding.round_features(x, plan, 3)[1].isnan().any())


def test_the_local_frame_turns_with_the_features(device: torch.device) -> None:
    quantizer, pieces, total = problem(8, ((1, 3),))
    plan = rounding.plan(quantizer, pieces)
    assert plan is not None
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, total, 8, generator=generator, dtype=torch.float64).to(device)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0].to(device)
    turned = torch.einsum("ij,ajc->aic", turn, x)
    rounded = torch.einsum("ij,ajc->aic", turn, rounding.round_features(x, plan, 4))
    torch.testing.assert_close(rounding.round_features(turned.contiguous(), plan, 4), rounded, rtol=0, atol=1e-12)
