"""Averages of the rounded weights, which are deployed.

Frameworks keep an exponential moving average of a model's parameters in training, and evaluate and save the average. In
quantization-aware training the model does not compute with the parameters: they lie between codes, and a parameter that
jumps over a threshold averages to a value near it, whichever of the two codes is better. The average of the *rounded*
weights instead reflects how often each code was in use.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from gaq.quantizers.weights import WeightQuantizer

__all__ = ["averaging_deployed", "deployed_weights"]


@contextmanager
def deployed_weights(
    parameters: Mapping[str, torch.nn.Parameter], quantizers: Mapping[str, WeightQuantizer]
) -> Iterator[None]:
    """Set parameters to their rounded values within this context.

    Args:
        parameters: parameters of the model, by name.
        quantizers: quantizers of some of them, by the same names.
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
    average: object,
    method: str,
    parameters: Mapping[str, torch.nn.Parameter],
    quantizers: Mapping[str, WeightQuantizer],
) -> Iterator[None]:
    """Let the framework's average take rounded weights within this context.

    Args:
        average: the framework's averaging object, of any class; None if it averages nothing.
        method: name of its method that adds the present parameters to the average.
        parameters: parameters of the model, by name.
        quantizers: quantizers of some of them, by the same names.
    """
    if average is None:
        yield
        return
    update = getattr(average, method)

    @functools.wraps(update)
    def update_with_rounded(*args: object, **kwargs: object) -> object:
        with deployed_weights(parameters, quantizers):
            return update(*args, **kwargs)

    setattr(average, method, update_with_rounded)
    try:
        yield
    finally:
        delattr(average, method)
