"""Linear layers with integer weights: the Triton kernel and the reference against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq.files.packing import pack_int4
from gaq.kernels import linear
from gaq.quantizers.weights import largest_code
from gaq.settings import override

gpu_linear = pytest.importorskip(
    "gaq.kernels.gpu.linear", reason="needs Triton: pip install '.[gpu]'", exc_type=ImportError
)


def layer(
    seed: int, rows: int, inputs: int, outputs: int, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (not contiguous), codes, scales and a residual (not contiguous)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inputs, 2 * rows, generator=generator).T[::2] * torch.logspace(-3, 3, rows)[:, None]
    if rows > 1:
        x[1] = 0.0
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top - 1, top + 1, (inputs, outputs), generator=generator, dtype=torch.int8)
    groups = -(-inputs // group_size) if group_size else 1
    scale = torch.rand(groups, outputs, generator=generator) + 0.5
    return x, codes, scale, torch.randn(outputs, rows, generator=generator).T


def exact(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, top: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result in float64, from codes made in float32, and the weights."""
    weights = codes.double() * linear._scales(scale, codes.shape[0], group_size, torch.float64)
    if top:
        rows, step = linear.round_rows(x, top)
        return rows.double() @ weights * step, weights
    return x.double() @ weights, weights


# Two planes, three planes, and features left in float.
TOPS = (largest_code(16), largest_code(17), largest_code(24), 0)
shapes = st.sampled_from([(0, 5, 3), (1, 1, 1), (3, 1, 9), (17, 40, 20), (35, 70, 65), (5, 130, 1)])


@settings(max_examples=24, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=shapes,
    top=st.sampled_from(TOPS),
    kind=st.sampled_from([(8, 0), (8, 32), (4, 0), (4, 32)]),
    added=st.booleans(),
    by_kernel=st.booleans(),
)
def test_linear_is_exact(
    device: torch.device,
    seed: int,
    shape: tuple[int, int, int],
    top: int,
    kind: tuple[int, int],
    added: bool,
    by_kernel: bool,
) -> None:
    bits, group_size = kind
    x, codes, scale, residual = layer(seed, *shape, bits, group_size)
    stored = pack_int4(codes) if bits == 4 else codes
    expected, weights = exact(x, codes, scale, top, group_size)
    place = device if by_kernel else torch.device("cpu")
    on_place, added_there = (t.detach().to(place).requires_grad_() for t in (x, residual))
    with override(kernels="triton" if by_kernel else "auto"):
        out = linear.linear(
            on_place, stored.to(place), scale.to(place), added_there if added else None, top, group_size
        )
    probe = torch.linspace(-1.0, 1.0, out.numel()).view(shape[2], shape[0]).T
    inputs = [on_place, added_there] if added else [on_place]
    grads = [grad.cpu() for grad in torch.autograd.grad((out * probe.to(place)).sum(), inputs)]
    assert out.dtype == torch.float32
    out = out.detach().cpu()
    # Errors relative to the sum of the terms' absolute values.
    size = x.detach().abs().double() @ weights.abs() + residual.detach().abs().double() + 1e-30
    offset = residual.detach().double() if added else 0.0
    assert bool(((out.double() - expected - offset).abs() < 4e-7 * size).all())
    back = probe.double() @ weights.T
    size = probe.abs().double() @ weights.abs().T + 1e-30
    assert bool(((grads[0].double() - back).abs() < 4e-7 * size).all())
    if added:
        assert torch.equal(grads[1], probe)


@pytest.mark.parametrize("bits", [16, 24])
def test_large_sums_are_exact(device: torch.device, bits: int) -> None:
    """Here 256 (hi W) does not fit into 32 bits: every code and weight has the largest size."""
    top = largest_code(bits)
    inputs = 1100
    x = torch.ones(2, inputs)
    x[1] = -1.0
    codes = torch.full((inputs, 16), -128, dtype=torch.int8)
    scale = torch.ones(1, 16)
    out = linear.linear(x.to(device), codes.to(device), scale.to(device), None, top).cpu()
    rows, step = linear.round_rows(x, top)
    # The range is 1.000001 times the largest feature: less than half a step of 16 bits, nine steps of 24.
    assert top - (10 if bits == 24 else 0) <= float(rows.abs().max()) <= top
    expected = (rows.double() @ codes.double()).float() * step
    torch.testing.assert_close(out, expected, rtol=1.5e-7, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_every_element_is_written_and_nan_stays(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *shape: int, **options: Any) -> torch.Tensor:
        tensor = usual(self, *shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    x, codes, scale, residual = (t.to(device) for t in layer(0, 20, 33, 70, 8, 0))
    x = x.detach().requires_grad_()
    for top in TOPS:
        out = linear.linear(x, codes, scale, residual, top)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert bool(out.isfinite().all())
        assert bool(grad.isfinite().all())
    broken = x.detach().clone()
    broken[3, 5], broken[4, 6] = float("nan"), float("inf")
    for top in TOPS[:3]:
        out = linear.linear(broken, codes, scale, None, top)
        assert bool(out[3:5].isnan().all())
        assert bool(out[5:].isfinite().all())


def test_what_is_not_served_goes_elsewhere(device: torch.device) -> None:
    x, codes, scale, _ = (t.to(device) for t in layer(0, 4, 12, 5, 8, 0))
    assert gpu_linear.serves(x, codes, 0)
    assert not gpu_linear.serves(x.double(), codes, 0)
    assert not gpu_linear.serves(x, codes, 8)
    out = linear.linear(x.double(), codes, scale)
    torch.testing.assert_close(out, linear.reference(x.double(), codes, scale), rtol=1e-6, atol=1e-9)
    for top in TOPS:
        y = x.detach().requires_grad_()
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(linear.linear(y, codes, scale, None, top).sum(), y, create_graph=True)
    with pytest.raises(ValueError, match="residual of shape"):
        linear.linear(x, codes, scale, torch.ones(4, 4, device=device))
    with pytest.raises(ValueError, match="rows of scales"):
        linear.linear(x, codes, scale, None, TOPS[0], 4)
    with pytest.raises(ValueError, match="largest code 8355712: three int8 planes hold 8355711"):
        linear.linear(x, codes, scale, None, 8355712)
    with pytest.raises(ValueError, match="inputs"):
        linear.linear(x[:, :3], codes, scale)
    with pytest.raises(TypeError, match="floating"):
        linear.linear(x.int(), codes, scale)
    assert linear.MAX_INPUTS * 128 * 128 < 2**31


def test_on_a_cpu_it_is_the_reference(setting: Callable[..., Any]) -> None:
    setting(kernels="auto")
    x, codes, scale, residual = layer(0, 6, 12, 5, 8, 0)
    for top in TOPS:
        out = linear.linear(x, codes, scale, residual, top)
        assert torch.equal(out, linear.reference(x, codes, scale, residual, top))


def test_reference_is_straight_through() -> None:
    x, codes, scale, residual = layer(0, 6, 12, 5, 8, 0)
    x = x.double().requires_grad_()
    out = linear.reference(x, codes, scale, residual.double())
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, (codes.double() * scale).sum(1).expand_as(x))
    assert not torch.equal(out, linear.reference(x, codes, scale, residual.double(), 0))


def test_rounding_rows_again_changes_little() -> None:
    """Scalars come rounded by the quantizer, on the same steps: within half a step of the widest codes."""
    x = layer(3, 50, 64, 5, 8, 0)[0].double()
    for bits in (16, 20, 24):
        codes, step = linear.round_rows(x, largest_code(bits))
        again, step_again = linear.round_rows(codes * step, largest_code(bits))
        assert torch.equal(again, codes)
        assert bool(((again * step_again - codes * step).abs() < 0.5 * step).all())
