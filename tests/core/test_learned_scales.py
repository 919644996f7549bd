"""Scales trained beside the host's optimizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gaq.quantizers.weights import WeightLayout, WeightQuantizer
from gaq.training.learned_scales import CODE_STEP, ScaleLearner


def quantizer(bits: int = 4) -> tuple[WeightQuantizer, torch.Tensor]:
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    made = WeightQuantizer(WeightLayout.single((16, 8)), bits, "per_channel", 32)
    return made, weight


@pytest.mark.parametrize("factor", [0.6, 1.7])
def test_scales_find_a_small_error(factor: float) -> None:
    """Alone, with weights that stay, they come from far off to about where a search would put them."""
    made, weight = quantizer()
    made.search(weight, "error")

    def error() -> float:
        return float((made(weight) - weight).detach().square().sum())

    best = error()
    made.fix_scale(weight, scale=factor * made.current_scale(weight))
    before = error()
    learner = ScaleLearner({"weight": made})
    for _ in range(1000):
        (made(weight) - weight).square().sum().backward()
        learner.step()
    assert before > 1.9 * best
    assert error() < 1.2 * best


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_the_largest_code_moves_by_a_share_of_itself(bits: int) -> None:
    made, weight = quantizer(bits)
    made.fix_scale(weight)
    start = made.fixed_step.clone()
    learner = ScaleLearner({"weight": made})
    made(weight).sum().backward()
    learner.step(0.5)
    # The first step of Adam is a full one for every scale that has a gradient.
    moved = (made.fixed_step.detach() / start).log().abs() * made.top
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5 * CODE_STEP), rtol=0.05 if bits < 16 else 0.5, atol=0)


def test_steps_go_with_the_optimizer_of_the_host() -> None:
    made, weight = quantizer()
    made.fix_scale(weight)
    parameter = torch.nn.Parameter(weight)
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    learner = ScaleLearner({"weight": made})
    learner.attach(optimizer)
    sizes = []
    for _ in range(3):
        before = made.fixed_step.detach().clone()
        optimizer.zero_grad()
        made(parameter).sum().backward()
        optimizer.step()
        schedule.step()
        assert made.fixed_step.grad is None
        sizes.append(float((made.fixed_step.detach() / before).log().abs().max()))
    assert sizes[0] == pytest.approx(CODE_STEP / made.top, rel=1e-3)
    assert sizes[0] > 5 * sizes[1] > 25 * sizes[2]
    learner.finish()
    held = made.fixed_step.clone()
    assert not held.requires_grad
    made(parameter).sum().backward()
    optimizer.step()
    assert torch.equal(made.fixed_step, held)


def test_learned_scales_do_not_follow_the_weights() -> None:
    made, weight = quantizer()
    made.refresh_scale(weight)
    learner = ScaleLearner({"weight": made})
    held = made.fixed_step.detach().clone()
    made.refresh_scale(2 * weight)
    assert torch.equal(made.fixed_step, held)
    learner.finish()
    made.refresh_scale(2 * weight)
    assert torch.equal(made.fixed_step, held)
    assert copy.deepcopy(made).scale_is_learned


def test_there_is_nothing_to_learn_before_a_scale_is_held() -> None:
    made, weight = quantizer()
    with pytest.raises(RuntimeError, match="hold the scale first"):
        made.learn_scale(True)
    assert ScaleLearner({"weight": made}).quantizers == []
    assert math.isfinite(float(made(weight).sum()))


def test_an_adopted_scale_is_the_one_that_is_found_again() -> None:
    made, weight = quantizer()
    weight[:, 3] = 0.0
    made.fix_scale(weight, scale=torch.linspace(0.05, 0.2, 8))
    made.adopt_scale(weight)
    made.refresh_scale(weight)
    wanted = torch.linspace(0.05, 0.2, 8)
    keep = torch.arange(8) != 3
    # As bfloat16 keeps it, rounded up.
    torch.testing.assert_close(made.fixed_step[keep], wanted[keep], rtol=0.01, atol=0)
