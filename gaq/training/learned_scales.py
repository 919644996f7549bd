r"""Scales of the weights that are trained with the weights.

The scale s of a group of weights w has the gradient of Esser et al. 2020 (LSQ, arXiv 1902.08153, equation 3),

.. math:: \partial \hat w / \partial s = \mathrm{round}(w / s) - w / s

within the range and its end beyond it, which `gaq.quantizers.weights.WeightQuantizer` has by itself, in the second
derivative that a loss on forces asks for as well. It is followed here by an Adam of our own, beside the host's
optimizer and step by step with it, so that nothing in the host's parameters, optimizer and checkpoints changes. It
works on the logarithm of the scale: a step is a share of it, and such that the largest code moves by at most
`CODE_STEP` of a code, whatever the number of bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gaq.quantizers.weights import WeightQuantizer

__all__ = ["CODE_STEP", "ScaleLearner"]

CODE_STEP = 7e-3
"""Codes by which the largest code of a group may move in one step, at the host's first learning rate."""

BETAS = (0.9, 0.999)


class ScaleLearner:
    """Trains the scales that some weight quantizers hold.

    Args:
        quantizers: by parameter name; those that hold no scale are left alone.
    """

    def __init__(self, quantizers: Mapping[str, WeightQuantizer]) -> None:
        self.quantizers = [q for q in quantizers.values() if q.scale_is_fixed]
        for quantizer in self.quantizers:
            quantizer.learn_scale(True)
        self.moments: list[tuple[Tensor, Tensor]] = [
            (torch.zeros_like(q.fixed_step), torch.zeros_like(q.fixed_step)) for q in self.quantizers
        ]
        self.steps = 0
        self.handle: Any = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Step whenever the host's optimizer does, with the share of the first learning rate that it has then."""
        first = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]

        def after(stepped: torch.optim.Optimizer, *_: Any) -> None:
            shares = [float(g["lr"]) / lr for g, lr in zip(stepped.param_groups, first, strict=False) if lr > 0]
            self.step(max(shares, default=0.0))

        self.handle = optimizer.register_step_post_hook(after)

    @torch.no_grad()
    def step(self, share: float = 1.0) -> None:
        """Move every scale that has a gradient; `share` of the full step."""
        self.steps += 1
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        for quantizer, (mean, square) in zip(self.quantizers, self.moments, strict=True):
            scale = quantizer.fixed_step
            gradient = torch.zeros_like(scale) if scale.grad is None else scale.grad * scale
            scale.grad = None
            if distributed:
                torch.distributed.all_reduce(gradient)
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient**2, 1 - BETAS[1])
            direction = mean / (1 - BETAS[0] ** self.steps)
            direction /= (square / (1 - BETAS[1] ** self.steps)).sqrt() + 1e-30
            scale.mul_(torch.exp(-share * CODE_STEP / quantizer.top * direction))

    def finish(self) -> None:
        """Hold the scales as they are now, and leave the host's optimizer alone."""
        if self.handle is not None:
            self.handle.remove()
        for quantizer in self.quantizers:
            quantizer.fixed_step = quantizer.fixed_step.detach().clone()
