"""Train-time compiled models: fine rounding of features is one operation each, and one graph serves all settings."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nequip_models import build_model, molecules

import gaq
from gaq.model.state import feature_quantizers
from gaq_nequip.evaluate import make_batches
from gaq_nequip.live import is_live, live_rounding

MODES = ("eager", "compile")


def settings(model: Any) -> Iterator[bool]:
    """Set a model for training, validation and stages of the schedule, in turn; yields whether it trains."""
    for training, vectors, factor in ((True, False, 1.0), (False, True, 1.0), (True, True, 4.0), (True, True, 1.0)):
        model.train(training)
        for quantizer in feature_quantizers(model).values():
            quantizer.vectors_enabled, quantizer.vector_range_factor = vectors, factor
        yield training


@pytest.mark.parametrize(("preset", "graphs"), [("gaq", 1), ("w8a8", 4)])
def test_settings_that_share_a_graph(preset: str, graphs: int) -> None:
    model = gaq.prepare(build_model(compile_mode="compile"), {"preset": preset, "weights": None})
    assert len({model._switches() for _ in settings(model)}) == graphs


@pytest.mark.slow
def test_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, validation and all stages of the schedule share a graph that is hardly larger than NequIP's."""
    traced: list[torch.fx.GraphModule] = []

    def keep(module: Any, **options: Any) -> Any:
        traced.append(module)
        return module

    monkeypatch.setattr(torch, "compile", keep)  # the graph is the point, not its code
    spec = {"preset": "gaq", "weights": None}
    sizes = {"num_features": 4, "radial_mlp_width": 4}
    models = {mode: gaq.prepare(build_model("plain", "float64", compile_mode=mode, **sizes), spec) for mode in MODES}
    batch = make_batches(models["eager"], molecules()[:2], 1000)[0]
    called: list[Any] = []
    for quantizer in feature_quantizers(models["eager"]).values():
        quantizer.register_forward_hook(lambda *arguments: called.append(arguments))
    for stages in zip(*(settings(model) for model in models.values()), strict=True):
        training = stages[0]
        results = {}
        called.clear()
        for mode, model in models.items():
            model.zero_grad()
            forces = model(dict(batch))["forces"]
            if training:
                forces.square().sum().backward()
            results[mode] = [forces.detach(), *(p.grad for p in model.parameters() if p.grad is not None and training)]
        for mine, expected in zip(results["compile"], results["eager"], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
    (graph,) = traced
    rounded = [node for node in graph.graph.nodes if "round_live" in str(node.target)]
    assert len(rounded) == len(called) > 0
    assert not [node for node in graph.graph.nodes if "round.default" in str(node.target)]


def test_quantizers_are_as_before() -> None:
    """The operation is there while a graph is traced, and the numbers hold no model in memory."""
    module = sys.modules["gaq_nequip.live"]
    model = gaq.prepare(build_model(), {"preset": "gaq"})
    before = {name: type(quantizer) for name, quantizer in feature_quantizers(model).items()}
    with pytest.raises(RuntimeError, match="stop"), live_rounding(model):
        raise RuntimeError("stop")
    assert {name: type(quantizer) for name, quantizer in feature_quantizers(model).items()} == before
    coarse = gaq.prepare(build_model(), {"preset": "w8a8"})
    assert not [quantizer for quantizer in feature_quantizers(coarse).values() if is_live(quantizer)]
    numbers = [q.__dict__["live_number"] for q in feature_quantizers(model).values() if is_live(q)]
    assert set(numbers) <= set(module._quantizers.keys())
    del model
    gc.collect()
    assert not set(numbers) & set(module._quantizers.keys())
