"""A stand-in for what records steps on a GPU: it plays the function again, and writes where the first results lay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from gaq.kernels.gpu.graphs import Outputs


class Playback:
    """`gaq.kernels.gpu.graphs.Recorder` without a GPU; counts what it does."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def serves(self, device: torch.device) -> bool:
        return True

    def exclusive(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        self.recorded += 1
        outputs = {name: None if value is None else value.detach() for name, value in run().items()}
        for value in outputs.values():
            if value is not None and value.is_floating_point():
                # As on a GPU: recording computes nothing.
                value.fill_(torch.nan)

        def replay() -> None:
            self.replayed += 1
            for name, value in run().items():
                target = outputs[name]
                if value is not None and target is not None:
                    target.copy_(value.detach())

        return replay, outputs
