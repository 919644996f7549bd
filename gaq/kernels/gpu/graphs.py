"""Steps of equal shapes as CUDA graphs: recorded once, replayed with other numbers.

A step of a small system is some hundred kernels that each take less time than the host needs to launch one. A graph
launches them all at once. It reads its inputs where they lay when it was recorded, so these are copied into buffers of
its own before, and what it writes is overwritten by the next replay, so results are copied out after.

Lists that change their length from step to step (the edges) get buffers of the next size of a geometric series
(`bucket`); the step is told how many of the entries count. Whatever else a step depends on, and is not an input, has to
be part of the key.

Nothing here knows what a step computes. `Recorder` is what touches the card, and is replaced in tests.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from gaq import settings

__all__ = ["CudaRecorder", "Graphs", "Inputs", "Outputs", "Recorder", "bucket", "most_edges"]

KEPT = 8
"""Graphs that are kept, the least recently used go first."""
REMEMBERED = 64
"""Keys without a graph whose meetings are counted."""
MEETINGS, MEETINGS_AGAIN = 2, 32
"""How often a key is met until it is recorded; and one whose graph had to go, lest graphs chase each other."""
WARM_UPS = 3
"""Steps before a recording: what is compiled, planned or allocated at first use must not be recorded."""
TOLERANCE = 1e-3
"""Largest difference of a first replay to the step itself, relative to the largest value or 1."""
SMALLEST, RATIO, MULTIPLE = 64, 1.25, 8

Inputs = Mapping[str, "Tensor | int"]
Outputs = dict[str, "Tensor | None"]
Step = Callable[[dict[str, Tensor]], Outputs]


def bucket(count: int) -> int:
    """The size of the buffer for a list of `count` entries: a fourth longer than the next smaller one, rounded up."""
    size = SMALLEST
    while size < count:
        size = -(-int(size * RATIO) // MULTIPLE) * MULTIPLE
    return size


def most_edges() -> int:
    """The largest number of edges of a step that is recorded.

    ``GAQ_CUDA_GRAPHS`` sets it; 0 records nothing (see `gaq.settings.Settings`).
    """
    return settings.current().cuda_graphs


class Recorder(Protocol):
    """What records steps and replays them."""

    def serves(self, device: torch.device) -> bool:
        """Whether steps on a device can be recorded now."""

    def exclusive(self, device: torch.device) -> AbstractContextManager[None]:
        """Within it buffers are written and graphs replayed, after all that was asked for before has been done."""

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """What replays a function, and where the results then lie.

        Raises:
            RuntimeError: where the function cannot be recorded.
        """


class CudaRecorder:
    """`Recorder` of the card."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.done: torch.cuda.Event | None = None

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        with torch.cuda.device(device):
            # Buffers and memory are shared by all replays, and the host may have moved to another stream.
            if self.done is None:
                self.done = torch.cuda.Event()
            else:
                torch.cuda.current_stream().wait_event(self.done)
            yield
            self.done.record(torch.cuda.current_stream())

    def exclusive(self, device: torch.device) -> AbstractContextManager[None]:
        return self._on(device)

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(side)
        if self.pool is None:
            # One for all graphs: none is replayed before the results of the one before have been copied.
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the host may do with the card what they like.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = run()
        return graph.replay, outputs


def _close(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether results are the same but for the order of sums, and a feature here and there rounded the other way."""
    if found is None or expected is None:
        return found is expected
    expected = expected.detach()
    finite = expected[expected.isfinite()] if expected.is_floating_point() else expected.double()
    size = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    return torch.allclose(found.to(expected), expected, rtol=0.0, atol=TOLERANCE * size, equal_nan=True)


class _Recorded:
    """One graph with its buffers.

    Raises:
        RuntimeError: where the step cannot be recorded, or a replay does not give what the step does.
    """

    def __init__(self, recorder: Recorder, step: Step, buffers: dict[str, Tensor]) -> None:
        self.buffers = buffers
        # The step is kept: the graph reads tensors that may be known to nobody else.
        self.step = step
        expected = step(dict(buffers))
        self.replay, self.outputs = recorder.record(lambda: step(dict(buffers)))
        self.replay()
        wrong = [name for name, value in expected.items() if not _close(self.outputs[name], value)]
        if wrong:
            raise RuntimeError(f"replayed, a step gives other values of {', '.join(wrong)}")

    def __call__(self, inputs: Inputs) -> Outputs:
        for name, value in inputs.items():
            target = self.buffers[name]
            if isinstance(value, int):
                target.fill_(value)
            elif target.shape == value.shape:
                target.copy_(value.detach())
            else:
                target[tuple(slice(0, n) for n in value.shape)].copy_(value.detach())
        self.replay()
        return {name: None if value is None else value.detach().clone() for name, value in self.outputs.items()}


class Graphs:
    """Recorded steps by key.

    A step is recorded when its key is met the second time, so that structures met once cost nothing. The first replay
    is held against the step itself. Where recording fails the reason is logged, and none is tried again.

    Args:
        recorder: what records; the card by default.
        keep: graphs that are kept at most.
    """

    def __init__(self, recorder: Recorder | None = None, keep: int = KEPT) -> None:
        self.recorder: Recorder = CudaRecorder() if recorder is None else recorder
        self.keep = keep
        self.kept: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self.left: OrderedDict[Hashable, int] = OrderedDict()
        self.failed: str | None = None
        self.lock = threading.Lock()

    def serves(self, device: torch.device, edges: int) -> bool:
        """Whether a step is to be recorded: small enough, and on a card where recording has not failed."""
        most = most_edges()
        return self.failed is None and 0 < most >= edges and self.recorder.serves(device)

    def __call__(
        self,
        key: Hashable,
        inputs: Inputs,
        prepare: Callable[[], tuple[Step, Mapping[str, Tensor]]],
        device: torch.device,
    ) -> Outputs | None:
        """Results of a step, copies that belong to the caller; None where it has to be computed the ordinary way.

        Args:
            key: of all that the step depends on but the values of the inputs.
            inputs: by name. Tensors may be smaller than the buffers and fill their beginning; what lies beyond is
                left as it was. Numbers are for buffers of one element.
            prepare: gives the step, a function of the buffers, and what the buffers hold at first. The step must not
                change them, and must not wait for the card.
            device: where all of this lies.
        """
        with self.lock:
            recorded = self.kept.get(key)
            if recorded is None and not self._due(key):
                return None
            with self.recorder.exclusive(device):
                if recorded is None:
                    recorded = self._record(key, prepare)
                    if recorded is None:
                        return None
                self.kept.move_to_end(key)
                return recorded(inputs)

    def _due(self, key: Hashable) -> bool:
        left = self.left.pop(key, MEETINGS) - 1
        if left > 0:
            self._wait_for(key, left)
        return left <= 0

    def _wait_for(self, key: Hashable, meetings: int) -> None:
        self.left[key] = meetings
        while len(self.left) > REMEMBERED:
            self.left.popitem(last=False)

    def _record(self, key: Hashable, prepare: Callable[[], tuple[Step, Mapping[str, Tensor]]]) -> _Recorded | None:
        step, first = prepare()
        # Copies, whatever the caller has given: nobody else may write to them.
        buffers = {name: value.detach().clone() for name, value in first.items()}
        try:
            self.kept[key] = _Recorded(self.recorder, step, buffers)
        except RuntimeError as error:
            self.failed = str(error)
            self.kept.clear()
            logging.getLogger(__name__).warning(
                "gaq: steps are launched kernel by kernel, because they cannot be recorded as CUDA graphs: %s", error
            )
            return None
        # After the recording, which has waited for the card: what goes now is no longer in use there.
        while len(self.kept) > self.keep:
            self._wait_for(self.kept.popitem(last=False)[0], MEETINGS_AGAIN)
        return self.kept[key]
