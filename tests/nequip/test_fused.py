"""NequIP with the fused convolution: the same function, and the parts that compiled files need."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

import numpy as np
import torch
from ase import Atoms
from e3nn import o3
from nequip_models import build_model, molecules, without_distillation

import gaq
from gaq.adapter import adapter_for
from gaq.kernels import convolution, product, shims, signatures
from gaq.kernels.cpu import native
from gaq.quantizers.attention import RobustAttention
from gaq_nequip.engine import edges, fused
from gaq_nequip.engine.fused import FusedInteractionBlock, FusedProduct, fuse, refusals
from gaq_nequip.freeze import freeze
from gaq_nequip.sites import class_name

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")


def blocks(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, FusedInteractionBlock)]


@pytest.mark.parametrize("preset", ["w8", "gaq"])
@pytest.mark.parametrize("variant", ["plain", "parity", "wide", "unequal"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.smoke
def test_fused_is_the_same_function(
    quantized: Callable[..., Any],
    evaluate: Callable[..., Any],
    structures: list[Atoms],
    crystal: Atoms,
    variant: str,
    preset: str,
    dtype: str,
) -> None:
    # As it is, features of the symmetric crystal lie between two codes.
    crystal = crystal.copy()
    crystal.rattle(1e-3, seed=0)
    all_structures = [*structures, crystal, Atoms("CH", positions=[[0, 0, 0], [0, 0, 30.0]])]
    expected = evaluate(quantized(preset, variant, dtype, "frozen"), all_structures)
    model = quantized(preset, variant, dtype, "frozen")
    assert fuse(model) == {}
    ours = evaluate(model, all_structures)
    assert len(blocks(model)) == (3 if variant in ("parity", "unequal") else 2)
    # The interpolation's error (3e-8 of the radial weights), and 16-bit codes that fall to the other side.
    tolerance = 2e-5 if preset == "gaq" or dtype == "float32" else 3e-6
    scale = float(np.abs(expected[1]).max())
    np.testing.assert_allclose(ours[0], expected[0], atol=tolerance * scale * 10)
    np.testing.assert_allclose(ours[1], expected[1], atol=tolerance * scale * 10)


def with_attention(variant: str, frozen: bool = True, **changes: Any) -> Any:
    """A frozen or converted model in float64 with attention over messages, sharp enough to matter."""
    spec = without_distillation("w8", attention={"messages": True, "bits": 16}, weights={"rounding": "nearest"})
    model = gaq.prepare(build_model(variant, "float64", **changes), spec)
    for module in model.modules():
        if isinstance(module, RobustAttention):
            module.set_temperature(4.0)
    converted = gaq.convert(gaq.calibrate(model, molecules(), progress=False))
    return freeze(converted) if frozen else converted


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("variant", ["parity", "unequal"])
def test_the_convolution_is_nequips(quantized: Callable[..., Any], variant: str, attention: bool) -> None:
    """Tensor product and sum over neighbours, with the same radial weights in both: exact to float64."""
    model = with_attention(variant) if attention else quantized("w8", variant, "float64", "frozen")
    edge = edges.edge_part(model)
    sh = edges.fit_harmonics(edge.harmonics)
    generator = torch.Generator().manual_seed(0)
    sender, receiver = torch.randint(0, 5, (2, 40), generator=generator)
    vectors = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    attributes = edge.run(vectors)["edge_attrs"]
    for block in [m for m in model.modules() if class_name(m) in fused.BLOCKS]:
        chunked = fused.chunked_of(block, sh, edge.r_max, torch.device("cpu"), torch.float64)
        product = block.tp_scatter.tp
        x = torch.randn(5, product.irreps_in1.dim, generator=generator, dtype=torch.float64)
        weights = torch.randn(40, product.weight_numel, generator=generator, dtype=torch.float64)
        scaled, scales = weights, None
        if attention:
            factors = torch.rand(40, 4, generator=generator, dtype=torch.float64)
            scaled = weights * factors[:, block.head_of_weight]
            heads = fused.head_of_scale(chunked, block.heads)
            scales = factors[:, heads].view(40, chunked.problem.scales, chunked.problem.channels)
        expected = block.tp_scatter(x=x, edge_attr=attributes, edge_weight=scaled, edge_dst=receiver, edge_src=sender)
        message = convolution.convolution(
            chunked.problem,
            convolution.Graph(sender, receiver),
            chunked.rows(x),
            vectors,
            chunked.weights(weights, chunked.columns),
            tabulated=False,
            scales=scales,
        )
        torch.testing.assert_close(chunked.mul_ir(message, 5), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["plain", "parity", "unequal"])
def test_fused_attention_is_the_same_function(
    evaluate: Callable[..., Any], structures: list[Atoms], crystal: Atoms, variant: str
) -> None:
    all_structures = [*structures, crystal, Atoms("CH", positions=[[0, 0, 0], [0, 0, 30.0]])]
    model = with_attention(variant)
    expected = evaluate(copy.deepcopy(model), all_structures)
    assert refusals(model) == {}
    assert fuse(model) == {}
    assert all(isinstance(block, fused.FusedAttentionBlock) for block in blocks(model))
    ours = evaluate(model, all_structures)
    # As above; and the logits are rounded to 16 bits.
    scale = float(np.abs(expected[1]).max())
    np.testing.assert_allclose(ours[0], expected[0], atol=1e-4 * scale)
    np.testing.assert_allclose(ours[1], expected[1], atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_atoms_at_one_place_give_nan(quantized: Callable[..., Any], evaluate: Callable[..., Any], dtype: str) -> None:
    """NequIP's own forces on the two atoms are NaN; the kernels leave no plausible energy either."""
    atoms = molecules()[0]
    atoms.positions[3] = atoms.positions[0]
    model = quantized("gaq", "plain", dtype, "frozen")
    assert np.isnan(evaluate(model, [atoms])[1][[0, 3]]).all()
    assert fuse(model) == {}
    energies, forces = evaluate(model, [atoms, molecules()[1]])
    assert np.isnan(energies).tolist() == [True, False]
    assert np.isnan(forces[[0, 3]]).all()
    assert np.isfinite(forces[len(atoms) :]).all()


@pytest.mark.slow
def test_compiled_file(evaluate: Callable[..., Any], crystal: Atoms, tmp_path: Path) -> None:
    """Features whose number differs by l, with attention, in a file: forces are those of the model."""
    from gaq_nequip.deploy.compile import compile_model, frozen_copy
    from gaq_nequip.evaluate import make_batches
    from gaq_nequip.files import CompiledModel

    model = with_attention("plain", frozen=False, num_features=[20, 9])
    # NequIP's tracing leaves atoms out, and a graph of one atom would be another one.
    crystal = crystal.repeat(2)
    expected = evaluate(model, [crystal])
    (example,) = make_batches(model, [crystal], 1)
    path = tmp_path / "model.nequip.pt2"
    compile_model(frozen_copy(model, to_compile=True), example, path, "ase", "cpu", fused=True, tolerance=1.0)
    crystal.calc = CompiledModel(path, "cpu").calculator()
    scale = float(np.abs(expected[1]).max())
    assert crystal.get_potential_energy() == pytest.approx(float(expected[0][0]), abs=1e-4 * scale)
    np.testing.assert_allclose(crystal.get_forces(), expected[1], atol=1e-4 * scale)


def test_forces_are_the_gradient(quantized: Callable[..., Any], evaluate: Callable[..., Any]) -> None:
    model = quantized("w8", "parity", "float64", "frozen")
    fuse(model)
    atoms = Atoms("OHH", positions=[[0, 0, 0], [0.9, 0.1, 0], [-0.2, 0.95, 0.1]])
    forces = evaluate(model, [atoms])[1]
    h = 1e-4
    for index, axis in ((0, 0), (1, 1), (2, 2)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[index, axis] += sign * h
            energies.append(evaluate(model, [moved])[0][0])
        assert -(energies[0] - energies[1]) / (2 * h) == pytest.approx(forces[index, axis], abs=1e-6)


def test_what_is_not_served_is_left_alone_with_the_reason() -> None:
    from nequip.model import NequIPGNNModel

    model = NequIPGNNModel(
        seed=0,
        model_dtype="float32",
        r_max=4.0,
        per_edge_type_cutoff={"H": 3.0},
        type_names=["H", "C", "O"],
        avg_num_neighbors=6.0,
        l_max=1,
        parity=False,
        num_layers=2,
        num_features=8,
        radial_mlp_width=16,
    )
    gaq.prepare(model, {"preset": "w8", "distillation": {"steps": 0}})
    gaq.convert(model)
    freeze(model)
    known = refusals(model)
    kept = fuse(model)
    assert len(kept) == 2
    assert known == kept == adapter_for(model).unfused(model)
    assert all("per_edge_type_cutoff" in reason for reason in kept.values())
    assert not blocks(model)


@pytest.mark.parametrize("preset", ["w8", "gaq"])
@pytest.mark.parametrize("variant", ["allegro", "spline"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fused_product_is_the_same_function(
    quantized: Callable[..., Any],
    evaluate: Callable[..., Any],
    structures: list[Atoms],
    crystal: Atoms,
    variant: str,
    preset: str,
    dtype: str,
) -> None:
    all_structures = [*structures, crystal, Atoms("CH", positions=[[0, 0, 0], [0, 0, 30.0]])]
    expected = evaluate(quantized(preset, variant, dtype, "frozen"), all_structures)
    model = quantized(preset, variant, dtype, "frozen")
    assert fuse(model) == {}
    assert len([m for m in model.modules() if isinstance(m, FusedProduct)]) == (2 if variant == "allegro" else 3)
    ours = evaluate(model, all_structures)
    # No table here: only the order of summation differs, and 16-bit codes that fall to the other side.
    tolerance = 2e-4 if preset == "gaq" or dtype == "float32" else 1e-10
    scale = float(np.abs(expected[1]).max())
    np.testing.assert_allclose(ours[0], expected[0], atol=tolerance * scale)
    np.testing.assert_allclose(ours[1], expected[1], atol=tolerance * scale)


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("irreps", [("0e+1o+2e", "0e+1o+2e", "0e+1o+2e"), ("0e+1o", "0e+1o", "0e"), ("0e", "0e", "0e")])
@pytest.mark.smoke
def test_fused_product_is_that_of_allegro(irreps: tuple[str, str, str], coupled: bool) -> None:
    """With and without weights for each channel, several paths and one, diagonal coefficients and full ones."""
    contract = pytest.importorskip("allegro.nn._strided._contract", reason="needs Allegro: pip install '.[allegro]'")
    torch.manual_seed(0)
    contracter = contract.Contracter(
        *(o3.Irreps(text) for text in irreps), mul=5, path_channel_coupling=coupled
    ).double()
    x1 = torch.randn(11, 5, contracter.base_dim1, dtype=torch.float64)
    x2 = torch.randn(3, 5, contracter.base_dim2, dtype=torch.float64)
    centre = torch.randint(0, 3, (11,))
    expected = contracter(x1, x2, centre).detach()
    model = torch.nn.Sequential(contracter).requires_grad_(False)
    fuse(model)
    torch.testing.assert_close(model[0](x1, x2, centre), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.smoke
def test_shims_are_those_of_the_library(dtype: torch.dtype) -> None:
    """The declarations that Inductor gets name functions that the static library has, for its dtype only."""
    import subprocess

    archive = native.static_library(dtype) / f"lib{native.STATIC_NAME}.a"
    symbols = subprocess.run(["nm", str(archive)], capture_output=True, text=True, check=True).stdout
    assert {f"torch.{dtype_name}" for dtype_name in re.findall(r" T gaq_\w+_(float\d+)$", symbols, re.M)} == {
        str(dtype)
    }
    declarations = shims.c_shims()
    assert {str(operation) for operation in declarations} == {f"gaq.{name}.default" for name in signatures.OPERATIONS}
    for (declaration,) in declarations.values():
        name = declaration.split("(")[0].split()[-1]
        assert f" T {name}\n" in symbols


def test_static_library_is_made_once(setting: Callable[..., Any], tmp_path: Path) -> None:
    setting(cache=tmp_path)
    native.static_library.cache_clear()
    try:
        first = native.static_library(torch.float32)
        stamp = (first / f"lib{native.STATIC_NAME}.a").stat().st_mtime_ns
        native.static_library.cache_clear()
        assert native.static_library(torch.float32) == first
        assert (first / f"lib{native.STATIC_NAME}.a").stat().st_mtime_ns == stamp
        assert [p.name for p in tmp_path.iterdir()] == [first.name]
    finally:
        native.static_library.cache_clear()


def test_there_are_kernels_for_two_dtypes() -> None:
    with pytest.raises(TypeError, match=r"float32 or float64, not torch\.bfloat16"):
        native.static_library(torch.bfloat16)
    with pytest.raises(TypeError, match=r"float32 or float64, not torch\.bfloat16"):
        native.kernel("round", torch.bfloat16)


@pytest.mark.smoke
def test_operations_can_be_traced() -> None:
    """`torch.library`'s own checks of schema, fake tensors and gradient."""
    path = convolution.Path(0, 0, 0, torch.ones(1, 1, 1, dtype=torch.float64))
    problem = convolution.ConvolutionProblem(
        4, (0,), (0,), (path,), (torch.ones(1, 1, dtype=torch.float64),), 4.0, (0,)
    )
    ints, reals = problem.plan(0)
    generator = torch.Generator().manual_seed(0)
    arguments = (
        torch.randn(3, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True),
        ints,
        reals,
        torch.tensor([0, 1, 2, 0, 1]),
        torch.tensor([1, 2, 0, 2, 0]),
        torch.tensor([], dtype=torch.int64),
        problem.rows_out,
        3,
    )
    torch.library.opcheck(
        torch.ops.gaq.edge_convolution.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    other = product.ProductProblem.make(4, torch.ones(2, 3, 3, 1))
    torch.library.opcheck(
        torch.ops.gaq.edge_product.default,
        (
            torch.randn(5, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True),
            torch.randn(3, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True),
            torch.randn(4, 2, generator=generator, dtype=torch.float64),
            *other.plan,
            torch.tensor([0, 1, 2, 0, 1]),
            other.rows_out,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )
