"""Averages of the weights that are deployed.

Hosts keep an exponential moving average of a model's parameters while it trains, and evaluate and save that. In
quantization-aware training the parameters are not what the model computes with: they lie between codes, and one that
hops over a threshold averages to a place beside it, whichever of the two codes served better. The average that follows
the *rounded* weights instead counts how often each code was in use.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from gaq.quantizers.weights import WeightQuantizer

__all__ = ["averaging_deployed", "deployed_weights"]


@contextmanager
def deployed_weights(
    parameters: Mapping[str, torch.nn.Parameter], quantizers: Mapping[str, WeightQuantizer]
) -> Iterator[None]:
    """Within this context parameters hold what their quantizers round them to.

    Args:
        parameters: by name.
        quantizers: of some of them, by the same names.
    """
    kept = {name: parameters[name].data for name in quantizers}
    try:
        with torch.no_grad():
            for name, quantizer in quantizers.items():
                parameters[name].data = quantizer(kept[name])
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data = value


@contextmanager
def averaging_deployed(
    average: Any,
    method: str,
    parameters: Mapping[str, torch.nn.Parameter],
    quantizers: Mapping[str, WeightQuantizer],
) -> Iterator[None]:
    """Within this context a host's average takes in rounded weights.

    Args:
        average: the host's object; None if it averages nothing.
        method: its method that takes in the parameters as they are.
        parameters: of the model, by name.
        quantizers: of some of them, by the same names.
    """
    if average is None:
        yield
        return
    update = getattr(average, method)

    @functools.wraps(update)
    def take_in(*args: Any, **kwargs: Any) -> Any:
        with deployed_weights(parameters, quantizers):
            return update(*args, **kwargs)

    setattr(average, method, take_in)
    try:
        yield
    finally:
        delattr(average, method)
