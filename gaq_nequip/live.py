"""The rounding of features as one operation of a graph that is compiled for training.

The plain operations of the rounding would double such a graph, and each setting of a branch would need a graph of its
own. Here the graph holds a call with the number of a quantizer, which rounds as it is set when the call is made: with
or without vectors, in training and in validation. So there is one graph for all, as there is without rounding.

It serves quantizers through which the gradient passes unchanged (`FeatureQuantizer.passes_through`).
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gaq.caches import WeakValueCache
from gaq.quantizers.features import FeatureQuantizer
from gaq.untyped import Context

__all__ = ["is_live", "live_rounding"]

_quantizers: WeakValueCache[int, FeatureQuantizer] = WeakValueCache()
_numbers = itertools.count()

# A package has a copy of this module, whose operation must not take the place of this one.
_NAME = "gaq::round_live_" + "".join(c if c.isalnum() else "_" for c in __name__)


@torch.library.custom_op(_NAME, mutates_args=())
def _round_live(features: Tensor, number: int) -> Tensor:
    # The same sum as in `FeatureQuantizer.forward`, to the last bit.
    quantizer = _quantizers.peek(number)
    assert quantizer is not None
    return (features + (quantizer.values(features) - features)).contiguous()


@_round_live.register_fake
def _round_live_fake(features: Tensor, number: int) -> Tensor:
    return features.new_empty(features.shape)


def _pass(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


_round_live.register_autograd(_pass)


class _Live:
    """Base that makes a `FeatureQuantizer` one operation."""

    live_number: int

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = _round_live(x, self.live_number)
        return rounded


def is_live(module: torch.nn.Module) -> bool:
    """Whether `live_rounding` serves a module, whose settings then need no graphs of their own."""
    # By name: a packaged model has its own copy of the class. Its subclasses compute something else.
    return type(module).__name__ == FeatureQuantizer.__name__ and bool(module.passes_through)


@contextmanager
def live_rounding(model: torch.nn.Module) -> Iterator[None]:
    """Within this context, graphs traced from a model hold the rounding of features as one operation each."""
    before = {module: type(module) for module in model.modules() if is_live(module)}
    try:
        for quantizer, kind in before.items():
            number = next(_numbers)
            quantizer.__dict__["live_number"] = number
            _quantizers.put(number, quantizer)  # type: ignore[arg-type]  # by `is_live`
            quantizer.__class__ = type(f"Live{kind.__name__}", (_Live, kind), {})
        yield
    finally:
        for quantizer, kind in before.items():
            quantizer.__class__ = kind
