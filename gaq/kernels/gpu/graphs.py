"""Steps of equal shapes as CUDA graphs: recorded once, replayed with other values.

A step of a small system launches some hundred kernels, and each takes less time than the host needs to launch it. A
graph launches them all at once. It reads its inputs where they lay when it was recorded, so the inputs are first
copied into the graph's own buffers. The next replay overwrites its results, so these are copied out.

A list whose length changes from step to step (the edges) gets a buffer of the next size of a geometric series
(`bucket`), and the step is told how many entries count. All else that a step depends on must be part of the key.

Nothing here knows what a step computes. Only a `Recorder` touches the GPU, and tests replace it.
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
"""Graphs that are kept; the least recently used go first."""
REMEMBERED = 64
"""Keys without a graph whose calls are counted."""
MEETINGS, MEETINGS_AGAIN = 2, 32
"""Calls of a key until it is recorded: of a new key, and of one whose graph was dropped. The second is larger, so that
graphs do not keep displacing each other."""
WARM_UPS = 3
"""Steps before a recording: what is compiled, planned or allocated on first use must not be recorded."""
TOLERANCE = 1e-3
"""Largest difference between the first replay and the step, relative to the largest value or 1."""
SMALLEST, RATIO, MULTIPLE = 64, 1.25, 8

Inputs = Mapping[str, "Tensor | int"]
Outputs = dict[str, "Tensor | None"]
Step = Callable[[dict[str, Tensor]], Outputs]


def bucket(count: int) -> int:
    """Size of the buffer for a list of `count` entries. Each size is the previous one times 1.25, rounded up to 8."""
    size = SMALLEST
    while size < count:
        size = -(-int(size * RATIO) // MULTIPLE) * MULTIPLE
    return size


def most_edges() -> int:
    """Largest number of edges for which a step is recorded.

    ``GAQ_CUDA_GRAPHS`` sets it; 0 turns recording off (see `gaq.settings.Settings`).
    """
    return settings.current().cuda_graphs


class Recorder(Protocol):
    """Interface that records and replays steps."""

    def serves(self, device: torch.device) -> bool:
        """Whether steps on a device can be recorded now."""

    def exclusive(self, device: torch.device) -> AbstractContextManager[None]:
        """Context in which buffers are written and graphs replayed, after all earlier work on the device."""

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record a function.

        Returns:
            A function that replays it, and the tensors that a replay writes its results to.

        Raises:
            RuntimeError: if the function cannot be recorded.
        """


class CudaRecorder:
    """`Recorder` on a GPU."""

    def __init__(self) -> None:
        self.pool: Any = None  # handle of CUDA, which torch does not type
        self.done: torch.cuda.Event | None = None

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        with torch.cuda.device(device):
            # All replays share buffers and memory, and the caller may have changed the stream.
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
            # One pool for all graphs: results are copied out before the next replay.
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU while this one records.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = run()
        return graph.replay, outputs


def _close(result: Tensor | None, expected: Tensor | None) -> bool:
    """Whether results agree up to the order of sums, and a few features rounded to the neighbouring code."""
    if result is None or expected is None:
        return result is expected
    expected = expected.detach()
    finite = expected[expected.isfinite()] if expected.is_floating_point() else expected.double()
    size = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    return torch.allclose(result.to(expected), expected, rtol=0.0, atol=TOLERANCE * size, equal_nan=True)


class _Recorded:
    """A graph with its buffers.

    Raises:
        RuntimeError: if the step cannot be recorded, or a replay gives other values than the step.
    """

    def __init__(self, recorder: Recorder, step: Step, buffers: dict[str, Tensor]) -> None:
        self.buffers = buffers
        # The step is kept alive: the graph reads tensors that nothing else may refer to.
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

    A step is recorded at the second call with its key, so that structures computed once cost nothing. The first replay
    is compared with the step itself. If a recording fails, the reason is logged, and no further one is tried.

    Args:
        recorder: records and replays; a `CudaRecorder` by default.
        keep: largest number of graphs that are kept.
    """

    def __init__(self, recorder: Recorder | None = None, keep: int = KEPT) -> None:
        self.recorder: Recorder = CudaRecorder() if recorder is None else recorder
        self.keep = keep
        self.kept: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self.left: OrderedDict[Hashable, int] = OrderedDict()
        self.failed: str | None = None
        self.lock = threading.Lock()

    def serves(self, device: torch.device, edges: int) -> bool:
        """Whether a step may be recorded: it is small enough, and recording has not failed on its GPU."""
        most = most_edges()
        return self.failed is None and 0 < most >= edges and self.recorder.serves(device)

    def __call__(
        self,
        key: Hashable,
        inputs: Inputs,
        prepare: Callable[[], tuple[Step, Mapping[str, Tensor]]],
        device: torch.device,
    ) -> Outputs | None:
        """Replay a step, recording it first where that is due.

        Args:
            key: of all that the step depends on, except the values of the inputs.
            inputs: by name. A tensor may be smaller than its buffer and fills the beginning; the rest of the buffer
                stays as it was. A number fills a buffer of one element.
            prepare: returns the step, a function of the buffers, and the first contents of the buffers. The step must
                not change the buffers, and must not wait for the GPU.
            device: of the buffers.

        Returns:
            Copies of the results, which belong to the caller; None where the step has to be computed as usual.
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
        """Count a call of a key that has no graph, and say whether it is time to record one."""
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
        # Copies, because nobody else may write to the buffers.
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
        # The recording has waited for the GPU, so the graphs dropped here are no longer in use.
        while len(self.kept) > self.keep:
            self._wait_for(self.kept.popitem(last=False)[0], MEETINGS_AGAIN)
        return self.kept[key]
