"""What is quantized: every weight has a place, and inputs are classed by what they really depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mace  # noqa: F401  (before e3nn)
import pytest
import torch
from e3nn import o3

import gaq
from gaq_mace.evaluate import make_batches
from gaq_mace.sites import POSITION_FREE, bystanders, find_sites
from gaq_mace.weights import weight_quantizers

VARIANTS = ("plain", "heads", "l2", "density", "correlation3", "residual_first")


LATER = (
    ("interactions.1.linear_up", 11),
    ("interactions.1.linear.", 11),
    ("interactions.1.conv_tp_weights.layer1", 11),
    ("products.1.linear", 11),
    ("interactions.1.conv_tp_weights.layer2", 10),
    ("interactions.1.skip_tp", 10),
)


def test_bits_follow_from_what_passes_through(float_model: Callable[..., Any]) -> None:
    """Few bits only where there are many weights; a model that is small beside its file has the most there are."""
    model = gaq.prepare(float_model("plain"), "w4")
    bits = {name: quantizer.bits for name, quantizer in weight_quantizers(model).items()}
    sensitive = tuple(f"{site.name}." for site in find_sites(model) if site.sensitive)
    for name, bits_of_site in bits.items():
        if name.startswith(sensitive):
            assert bits_of_site == 14, name
        else:
            assert bits_of_site == next((n for start, n in LATER if name.startswith(start)), 12), name
    assert set(bits.values()) == {10, 11, 12, 14}
    spec = {"preset": "w4", "weights": {"compression": None, "sensitive_bits": 16}}
    plain = gaq.prepare(float_model("plain"), spec)
    assert {quantizer.bits for quantizer in weight_quantizers(plain).values()} == {4, 16}
    small = gaq.prepare(float_model("plain"), {"preset": "w4", "weights": {"compression": None}})
    assert {quantizer.bits for quantizer in weight_quantizers(small).values()} == {4}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_tile_the_parameters(float_model: Callable[..., Any], variant: str) -> None:
    model = float_model(variant)
    parameters = dict(model.named_parameters())
    for site in find_sites(model):
        for weight in site.weights:
            parameter = parameters[f"{site.name}.{weight.path}"]
            assert weight.layout.shape == tuple(parameter.shape)
            times_covered = torch.zeros(parameter.numel(), dtype=torch.int64)
            for block in weight.layout.blocks:
                times_covered[block.offset : block.offset + block.numel] += 1
            assert bool((times_covered == 1).all()), weight
            for granularity in ("per_tensor", "per_channel", "per_group"):
                index = weight.layout.scale_index(granularity, 4)
                assert torch.equal(index.unique(), torch.arange(int(index.max()) + 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_are_the_matrices_of_e3nn(float_model: Callable[..., Any], variant: str) -> None:
    model = float_model(variant)
    compared = 0
    for site in find_sites(model):
        if site.kind not in ("linear", "tensor_product"):
            continue
        flat = site.module.weight.detach().reshape(-1)
        blocks = site.weights[0].layout.blocks
        views = list(site.module.weight_views())
        assert len(blocks) == len(views)
        for block, view in zip(blocks, views, strict=True):
            assert torch.equal(flat[block.offset : block.offset + block.numel].view(block.shape), view)
            compared += 1
    assert compared > 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_of_a_scale_share_nothing(float_model: Callable[..., Any], variant: str) -> None:
    """Per channel, one scale serves one output channel: weights that share it never feed two outputs."""
    for site in find_sites(float_model(variant)):
        if site.kind != "linear" or site.name.startswith("node_embedding"):
            continue
        layout = site.weights[0].layout
        index = layout.scale_index("per_channel", 32)
        assert isinstance(site.module, o3.Linear)
        expected = sum(block.shape[1] for block in layout.blocks)
        assert int(index.max()) + 1 == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_depend_on_positions_as_declared(
    float_model: Callable[..., Any], structures: list[Any], variant: str
) -> None:
    model = float_model(variant)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    depends: dict[str, bool] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            first = arguments[0] if arguments else next(iter(keywords.values()))
            depends[name] = depends.get(name, False) or first.requires_grad

        return hook

    sites = find_sites(model)
    for site in sites:
        # What is rounded within a density block is a function of what its density network reads.
        module: Any = site.module.density_fn if site.kind == "density" else site.module
        module.register_forward_pre_hook(watch(site.name), with_kwargs=True)
    (batch,) = make_batches(model, structures, 1000)
    model(batch, compute_force=True)
    assert set(depends) == {site.name for site in sites}, "every site is reached"
    for site in sites:
        assert depends[site.name] == (site.input_note != POSITION_FREE), site.name
        if site.features is not None:
            assert depends[site.name], site.name
    assert sum(not value for value in depends.values()) >= 2  # node embedding and first linear_up


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_else_has_a_reason(float_model: Callable[..., Any], variant: str) -> None:
    model = float_model(variant)
    others = list(bystanders(model))
    assert all(other.reason and other.reason != "not a known kind" for other in others)
    names = {other.name for other in others} | {site.name for site in find_sites(model)}
    assert {"spherical_harmonics", "radial_embedding", "atomic_energies_fn", "scale_shift"} <= names
    assert {f"interactions.{i}.conv_tp" for i in range(2)} <= names
