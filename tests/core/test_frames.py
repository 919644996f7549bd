"""Frames that turn with the features, and ranges of each atom's own: exact equivariance, whatever the bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dependent_mixtures import nearly_dependent
from torch import Tensor

from gaq.checks.rotations import random_rotation
from gaq.config.parse import ScalarConfig, VectorConfig
from gaq.quantizers.features import FeatureLayout, FeatureQuantizer
from gaq.quantizers.frames import local_frame, local_frame_at_once, mixtures

PATHS = pytest.mark.parametrize("plain", [True, False], ids=["plain", "fused"])
CODES = [
    {},
    {"magnitude_bits": 8, "direction_bits": 8},
    {"magnitude_bits": 8, "direction_bits": 6, "codebook": "geodesic"},
    {"magnitude_bits": 8, "direction_bits": 4, "codebook": "geodesic"},
]


def orthogonal(dimension: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix: what a rotation does to features of any l is one of these."""
    q, r = torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def make(layout: FeatureLayout, plain: bool, vectors: dict[str, Any] | None = None, bits: int = 8) -> FeatureQuantizer:
    quantizer = FeatureQuantizer(layout, ScalarConfig(bits=bits), VectorConfig(**(vectors or {})), headroom=1.0)
    quantizer.differentiable_twice = plain
    return quantizer


def close(first: Tensor, second: Tensor, share: float = 0.999) -> bool:
    """Equal to rounding but for a few numbers that lay on the edge between two codes."""
    return float(((first - second).abs() < 1e-9).double().mean()) >= share


@PATHS
@pytest.mark.parametrize("dimension", [3, 5, 7, 9])
@pytest.mark.parametrize("vectors", CODES, ids=str)
def test_rounding_commutes_with_rotations(dimension: int, vectors: dict[str, Any], plain: bool) -> None:
    generator = torch.Generator().manual_seed(dimension)
    quantizer = make(FeatureLayout(((12, dimension),)), plain, vectors)
    x = torch.randn(50, 12, dimension, dtype=torch.float64, generator=generator)
    turn = orthogonal(dimension, generator)
    rounded = quantizer(x.flatten(1)).unflatten(1, (12, dimension))
    turned = quantizer((x @ turn.T).flatten(1)).unflatten(1, (12, dimension))
    assert close(turned, rounded @ turn.T)
    assert (rounded - x).abs().max() > 1e-5  # it does round
    inverted = quantizer((-x).flatten(1)).unflatten(1, (12, dimension))
    assert close(inverted, -rounded)


@PATHS
def test_forces_commute_with_rotations(plain: bool) -> None:
    """The straight-through gradient turns with the features as well."""
    quantizer = make(FeatureLayout(((6, 3),)), plain)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(20, 6, 3, dtype=torch.float64, generator=generator)
    turn = random_rotation(torch.float64, torch.device("cpu"))

    def gradient(x: Tensor, weight: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        (quantizer(x.flatten(1)).unflatten(1, (6, 3)) * weight).sum().backward()
        assert x.grad is not None
        return x.grad

    assert close(gradient(x @ turn.T, weight @ turn.T), gradient(x, weight) @ turn.T)


@pytest.mark.parametrize("dimension", [3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_axes_are_orthonormal(dimension: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    atol = 1e-5 if dtype == torch.float32 else 1e-12
    for span in range(dimension + 1):
        basis = torch.randn(span, dimension, dtype=torch.float64, generator=generator)
        x = (torch.randn(30, 8, span, dtype=torch.float64, generator=generator) @ basis).to(dtype)
        axes = local_frame(x, mixtures(dimension, 8).to(dtype), dimension)
        gram = axes @ axes.transpose(1, 2)
        # Axes that are left over may be zero: nothing of the vectors lies there.
        present = gram.diagonal(dim1=1, dim2=2).round()
        assert torch.allclose(gram, torch.diag_embed(present), atol=atol)
        assert (present.sum(1) >= min(span + 1, dimension)).all() or span == 0
        assert torch.allclose(x @ axes.transpose(1, 2) @ axes, x, atol=1e-4 if dtype == torch.float32 else 1e-12)
        if dimension > 3:  # the third axis of three is a cross product
            axes = local_frame_at_once(x, mixtures(dimension, 8).to(dtype), dimension)
            identity = torch.eye(dimension, dtype=dtype).expand(30, -1, -1)
            assert torch.allclose(axes @ axes.transpose(1, 2), identity, atol=atol)


@PATHS
@pytest.mark.parametrize("dimension", [3, 5, 7])
@pytest.mark.parametrize("left", [0.0, 1e-8, 1e-6, 1e-5])
def test_no_component_is_lost_where_mixtures_are_dependent(dimension: int, left: float, plain: bool) -> None:
    # Atoms in motion pass such places all the time: the determinant of the mixtures changes its sign there.
    x = nearly_dependent(dimension, 8, 1, left)
    quantizer = make(FeatureLayout(((8, dimension),)), plain, {}, bits=16)
    for dtype, atol in ((torch.float32, 2e-3), (torch.float64, 2e-3)):
        rounded = quantizer(x.to(dtype).flatten(1)).unflatten(1, (8, dimension))
        assert (rounded - x.to(dtype)).abs().max() < atol * float(x.abs().max())


@PATHS
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_symmetric_sites(plain: bool, channels: int) -> None:
    """Vectors on one axis keep it exactly; vectors in a plane stay in it; zero stays zero."""
    generator = torch.Generator().manual_seed(1)
    quantizer = make(FeatureLayout(((channels, 3),)), plain)
    axis = torch.nn.functional.normalize(torch.randn(3, dtype=torch.float64, generator=generator), dim=0)
    line = torch.randn(10, channels, 1, dtype=torch.float64, generator=generator) * axis
    rounded = quantizer(line.flatten(1)).unflatten(1, (channels, 3))
    assert torch.linalg.cross(rounded, axis.expand_as(rounded)).abs().max() < 1e-12
    normal = torch.linalg.cross(axis, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    flat = torch.randn(10, channels, 3, dtype=torch.float64, generator=generator)
    flat = flat - (flat @ normal).unsqueeze(-1) * normal / (normal @ normal)
    assert (quantizer(flat.flatten(1)).unflatten(1, (channels, 3)) @ normal).abs().max() < 1e-12
    assert quantizer(torch.zeros(3, 3 * channels)).abs().max() == 0


@PATHS
@pytest.mark.parametrize("first", [False, True], ids=["mul_ir", "channels_first"])
def test_ranges_of_an_atom_are_its_own(plain: bool, first: bool) -> None:
    """Rounding commutes with scaling an atom's features, and does not see the other atoms."""
    layout = FeatureLayout(((4, 1), (4, 3), (4, 5)), channels_first=first)
    quantizer = make(layout, plain)
    generator = torch.Generator().manual_seed(2)
    shape = (20, 4, 9) if first else (20, 36)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    sizes = torch.logspace(-6, 6, 20, dtype=torch.float64).view(20, *[1] * (x.dim() - 1))
    rounded = quantizer(x)
    assert close(quantizer(x * sizes) / sizes, rounded)
    assert torch.allclose(quantizer(x[3:5]), rounded[3:5], rtol=0, atol=1e-12)
    # Eight bits of the largest feature of the atom, wherever it lies.
    assert (rounded - x).abs().max() < x.abs().max() / 50
    assert not quantizer.needs_ranges


@PATHS
def test_the_largest_feature_keeps_its_gradient(plain: bool) -> None:
    """It sets the range, and must not be found outside it."""
    quantizer = make(FeatureLayout(((5, 1), (5, 3))), plain, bits=16)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2000, 20, dtype=dtype, generator=torch.Generator().manual_seed(3)).requires_grad_(True)
        quantizer(x)[:, :5].sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad[:, :5], torch.ones_like(x.grad[:, :5]))


def test_irreps_of_one_dimension_have_axes_of_their_own() -> None:
    """1o and 1e turn alike but not under inversion: mixed axes would break parity."""
    quantizer = make(FeatureLayout(((4, 3), (4, 3))), True)
    x = torch.randn(30, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    odd = torch.cat((-torch.ones(12), torch.ones(12))).double()
    assert close(quantizer(x * odd), quantizer(x) * odd)


@pytest.mark.parametrize("dimension", [3, 5, 7])
@pytest.mark.parametrize("frame", ["local", "fixed"])
def test_deployed_values_and_gradients(dimension: int, frame: str) -> None:
    """From 14 bits on a deployed model takes the values alone and lets the gradient pass: both as the exact path's."""
    layout = FeatureLayout(((4, 1), (3, dimension)))
    exact = make(layout, True, {"frame": frame}, bits=16)
    deployed = make(layout, False, {"frame": frame}, bits=16)
    assert deployed.passes_through
    assert not make(layout, False, {"frame": frame}, bits=12).passes_through
    assert not make(layout, False, {"frame": frame, "granularity": "per_channel"}, bits=16).passes_through
    x = torch.randn(60, 4 + 3 * dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    x[3] = 0.0
    x[4, 4:] = 0.0
    weight = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    results = []
    for quantizer in (exact, deployed):
        leaf = x.clone().requires_grad_(True)
        out = quantizer(leaf)
        (out * weight).sum().backward()
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    assert close(results[1][0], results[0][0])
    assert torch.equal(results[1][0][3], x[3])
    # The Jacobian differs from the identity by the relative error of the vector, largest for the smallest ones.
    assert torch.allclose(results[1][1], results[0][1], atol=2e-3)
    assert float((results[1][1] - results[0][1]).abs().median()) < 3e-5


@pytest.mark.parametrize("vectors", CODES, ids=str)
def test_both_paths_and_torchscript_give_the_same(vectors: dict[str, Any]) -> None:
    layout = FeatureLayout(((4, 1), (3, 3), (2, 5)))
    plain, fused = make(layout, True, vectors), make(layout, False, vectors)
    x = torch.randn(40, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    weight = torch.randn(40, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    scripted = torch.jit.script(make(layout, True, vectors))
    results = []
    for quantizer in (plain, fused, scripted):
        leaf = x.clone().requires_grad_(True)
        out = quantizer(leaf)
        (out * weight).sum().backward()
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    for out, gradient in results[1:]:
        assert close(out, results[0][0])
        assert close(gradient, results[0][1])
