"""Codes that are chosen together, for weights that meet an embedding of few species."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq.quantizers.species import SpeciesWeightQuantizer, chosen_codes, seen_part
from gaq.quantizers.weights import Block, WeightLayout, WeightQuantizer

SPECIES, SIZE = 3, 64


def _embedding(seed: int = 0, species: int = SPECIES, size: int = SIZE) -> torch.nn.Embedding:
    torch.manual_seed(seed)
    return torch.nn.Embedding(species, size)


def _weight(seed: int = 0, features: int = 8, outputs: int = 5) -> tuple[Tensor, WeightLayout]:
    generator = torch.Generator().manual_seed(seed)
    blocks = (Block(0, (features * SIZE, outputs), 0), Block(features * SIZE * outputs, (4 * SIZE, 3), 0))
    numel = sum(b.numel for b in blocks)
    return torch.randn(numel, generator=generator), WeightLayout((numel,), blocks)


def _folded(weight: Tensor, layout: WeightLayout, table: Tensor) -> Tensor:
    """What species see of a weight, one matrix a species and block."""
    parts = []
    for block in layout.blocks:
        cube = weight.reshape(-1)[block.offset : block.offset + block.numel].view(-1, table.shape[1], block.shape[1])
        parts.append(torch.einsum("uvw,tv->tuw", cube.double(), table.double()).reshape(len(table), -1))
    return torch.cat(parts, 1)


def _quantizer(bits: int, layout: WeightLayout, embedding: torch.nn.Module, weight: Tensor) -> SpeciesWeightQuantizer:
    quantizer = SpeciesWeightQuantizer(layout, bits, embedding)
    quantizer.search(weight, "error")
    return quantizer


@pytest.mark.parametrize(("bits", "gain"), [(2, 997), (3, 27_984), (4, 44_169), (6, 59_361), (8, 62_537)])
def test_species_see_far_less_of_the_rounding(bits: int, gain: float) -> None:
    """For embeddings drawn at random; those of trained models are less even."""
    weight, layout = _weight()
    embedding = _embedding()
    table = embedding.weight.detach()
    plain = WeightQuantizer(layout, bits, "per_channel", 0)
    plain.search(weight, "error")
    errors = [
        (_folded(rounded, layout, table) - _folded(weight, layout, table)).pow(2).mean().sqrt()
        for rounded in (plain(weight), _quantizer(bits, layout, embedding, weight)(weight))
    ]
    assert float(errors[0] / errors[1]) == pytest.approx(gain, rel=0.2)


@settings(deadline=None, max_examples=4)
@given(st.integers(2, 16), st.integers(1, 8), st.integers(0, 1000))
def test_codes_are_codes(bits: int, species: int, seed: int) -> None:
    weight, layout = _weight(seed)
    quantizer = _quantizer(bits, layout, _embedding(seed, species), weight)
    tensor = quantizer.quantized(weight)
    assert int(tensor.codes.abs().max()) <= quantizer.top
    assert torch.equal(tensor.dequantize(), quantizer(weight))
    # What no species sees does not matter: species see as little of the rounding as before.
    table = quantizer.table()
    unseen = torch.randn(SIZE, 1)
    unseen -= seen_part(unseen, table).float()
    moved = weight.clone()
    moved[: layout.blocks[0].numel].view(-1, SIZE, 5).add_(unseen)
    exact = _folded(weight, layout, table)
    assert torch.allclose(_folded(moved, layout, table), exact, atol=1e-4)
    off, off_moved = (
        float((_folded(quantizer(w), layout, table) - exact).pow(2).mean().sqrt()) for w in (weight, moved)
    )
    assert off_moved < 1.5 * off + 2e-6


def test_one_species_too_many_still_rounds() -> None:
    """With as many species as numbers nothing can be hidden, and codes are no worse than the nearest ones."""
    weight, layout = _weight()
    embedding = _embedding(species=SIZE)
    quantizer = _quantizer(6, layout, embedding, weight)
    table = embedding.weight.detach()
    off = _folded(quantizer(weight), layout, table) - _folded(weight, layout, table)
    assert float(off.pow(2).mean().sqrt()) < 0.1 * float(_folded(weight, layout, table).pow(2).mean().sqrt())


def test_equal_and_zero_embeddings() -> None:
    table = torch.zeros(3, SIZE)
    table[1] = table[2] = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    x = torch.randn(SIZE, 10, generator=torch.Generator().manual_seed(1)) * 5
    codes = chosen_codes(seen_part(x, table), table, 127.0)
    assert torch.isfinite(codes).all()
    assert float((table.double() @ (x.double() - codes)).abs().max()) < 0.5
    nothing = torch.zeros_like(table)
    for top in (3.0, 127.0):
        assert not chosen_codes(seen_part(x, nothing), nothing, top).any()


def test_the_gradient_passes_straight_through() -> None:
    weight, layout = _weight()
    quantizer = _quantizer(4, layout, _embedding(), weight)
    quantizer.fix_scale(weight)
    weight.requires_grad_(True)
    factor = torch.randn(weight.numel())
    (gradient,) = torch.autograd.grad((quantizer(weight) * factor).sum(), weight, create_graph=True)
    assert torch.equal(gradient, factor)
    assert torch.equal(quantizer(weight).detach(), quantizer(weight.detach()))
    quantizer.enabled = False
    assert quantizer(weight) is weight


def test_held_codes_follow_the_weight_at_a_distance() -> None:
    """The difference to the rounded weight is kept, from 3 bits on; at 2 codes are chosen every time."""
    weight, layout = _weight()
    moved = weight + 0.01 * torch.randn(weight.numel(), generator=torch.Generator().manual_seed(1))
    for bits in (2, 3, 4):
        quantizer = _quantizer(bits, layout, _embedding(), weight)
        quantizer.fix_scale(weight)
        rounded, other = quantizer(weight), quantizer(moved)
        quantizer.hold(weight)
        assert torch.allclose(quantizer(weight), rounded, atol=1e-6, rtol=0.0)
        assert quantizer.held == (bits > 2)
        expected = rounded + (moved - weight) if bits > 2 else other
        assert torch.allclose(quantizer(moved), expected, atol=1e-6, rtol=0.0)
        # What is stored are codes of the weight as it is.
        assert torch.equal(quantizer.quantized(moved).dequantize(), other)
        held = quantizer.offset
        quantizer.hold(moved)
        quantizer.release(held)
        assert torch.allclose(quantizer(moved), expected, atol=1e-6, rtol=0.0)
        quantizer.release()
        assert torch.equal(quantizer(moved), other)
        assert not quantizer.offset.numel()
    # What is off is left alone.
    quantizer.enabled = False
    quantizer.hold(weight)
    assert quantizer(weight) is weight
    assert not quantizer.held


def test_settled_codes_stay() -> None:
    weight, layout = _weight()
    quantizer = _quantizer(4, layout, _embedding(), weight)
    tensor = quantizer.quantized(weight)
    rounded = tensor.dequantize()
    quantizer.fix_scale(weight, scale=tensor.scale)
    quantizer.settle()
    assert torch.equal(quantizer(rounded), rounded)
    assert torch.equal(quantizer.quantized(rounded).codes, tensor.codes)


def test_the_rounded_table_counts() -> None:
    """The embedding has a quantizer of its own, and what the model multiplies with is what that gives."""
    weight, layout = _weight()
    embedding = _embedding()
    embedding.weight_quantizer = WeightQuantizer(WeightLayout.single((SPECIES, SIZE), 1), 3, "per_channel", 0)
    quantizer = _quantizer(6, layout, embedding, weight)
    table = quantizer.table()
    assert torch.equal(table, embedding.weight_quantizer(embedding.weight).detach())
    off = _folded(quantizer(weight), layout, table) - _folded(weight, layout, table)
    exact = embedding.weight.detach()
    wrong = _folded(quantizer(weight), layout, exact) - _folded(weight, layout, exact)
    assert off.abs().max() < 0.1 * wrong.abs().max()


def test_copies_refer_to_the_embedding_beside_them() -> None:
    weight, layout = _weight()
    root = torch.nn.Module()
    root.embedding = _embedding()
    root.quantizer = SpeciesWeightQuantizer(layout, 6, root.embedding)
    for copied in (copy.deepcopy(root), pickle.loads(pickle.dumps(root))):
        assert copied.quantizer.__dict__["embedding"] is copied.embedding
        assert copied.embedding is not root.embedding
        assert torch.equal(copied.quantizer(weight), root.quantizer(weight))
    # It is not owned: one parameter, under one name.
    assert [name for name, _ in root.named_parameters()] == ["embedding.weight"]
    assert list(root.state_dict()) == ["embedding.weight"]


def test_traces_do_not_look_inside() -> None:
    weight, layout = _weight()
    quantizer = _quantizer(4, layout, _embedding(), weight)
    quantizer.fix_scale(weight)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda w: quantizer(w))(weight)
    names = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert sum("chosen_codes" in name for name in names) == 1
    assert len(names) < 100
    assert torch.equal(traced(weight), quantizer(weight))
