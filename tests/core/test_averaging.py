"""Averages that take in rounded weights."""

from __future__ import annotations

import torch

from gaq.quantizers.weights import WeightLayout, WeightQuantizer
from gaq.training.averaging import averaging_deployed, deployed_weights


class Average:
    """An exponential moving average as hosts have one."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - self.decay)


def model() -> tuple[torch.nn.Linear, dict[str, WeightQuantizer]]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 4)
    quantizer = WeightQuantizer(WeightLayout.single((4, 8), 1), 4, "per_channel", 32)
    quantizer.fix_scale(linear.weight)
    return linear, {"weight": quantizer}


def test_parameters_are_rounded_within_and_themselves_again_after() -> None:
    linear, quantizers = model()
    before = {name: p.detach().clone() for name, p in linear.named_parameters()}
    weight = linear.weight
    with deployed_weights(dict(linear.named_parameters()), quantizers):
        torch.testing.assert_close(linear.weight, quantizers["weight"](before["weight"]), rtol=0, atol=0)
        assert not torch.equal(linear.weight, before["weight"])
        assert torch.equal(linear.bias, before["bias"])
    assert linear.weight is weight
    for name, p in linear.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)


def test_an_average_counts_how_often_each_code_was_in_use() -> None:
    """A weight just above a threshold three times of four and far below it once averages to the upper code."""
    linear, quantizers = model()
    parameter = linear.weight
    step = quantizers["weight"].current_scale(parameter).detach()[0]
    average = Average([parameter], decay=0.0)
    averages = []
    with averaging_deployed(average, "update", dict(linear.named_parameters()), quantizers):
        for place in (2.51, 2.51, 1.6, 2.51):
            with torch.no_grad():
                parameter[0, 0] = place * step
            average.update()
            averages.append(average.values[0][0, 0].clone())
    assert [round(float(value / step), 4) for value in averages] == [3.0, 3.0, 2.0, 3.0]
    mean = torch.stack(averages).mean()
    assert torch.round(mean / step) == 3  # that of the latent weights, 2.28 steps, rounds to 2
    # Afterwards the host's own method is there again.
    assert "update" not in vars(average)
    average.update()
    assert torch.equal(average.values[0][0, 0], parameter[0, 0].detach())


def test_without_an_average_nothing_happens() -> None:
    linear, quantizers = model()
    with averaging_deployed(None, "update", dict(linear.named_parameters()), quantizers):
        pass
