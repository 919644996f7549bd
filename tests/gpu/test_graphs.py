"""Recorded steps: their keys, buffers and copies, with a stand-in for the GPU, and on a GPU if there is one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from recorded import Playback
from torch import Tensor

from gaq import settings
from gaq.kernels.gpu import graphs

CPU = torch.device("cpu")


class Sums:
    """A step on lists: the sum of the first `count` entries, and a scaled copy of a tensor of fixed length."""

    def __init__(self, scale: float) -> None:
        self.scale, self.calls = scale, 0

    def __call__(self, buffers: dict[str, Tensor]) -> graphs.Outputs:
        self.calls += 1
        values = buffers["values"]
        counts = torch.arange(values.shape[1], device=values.device) < buffers["count"]
        return {
            "sum": torch.where(counts, values, 0.0).sum(1),
            "copy": buffers["fixed"] * self.scale,
            "none": None,
        }

    def prepare(self, inputs: Mapping[str, Any], size: int) -> Callable[[], tuple[graphs.Step, dict[str, Tensor]]]:
        values = inputs["values"]
        spare = torch.full((values.shape[0], size - values.shape[1]), torch.nan, device=values.device)
        first = {**inputs, "values": torch.cat([values, spare], dim=1)}
        first["count"] = torch.full((), inputs["count"], device=values.device)
        return lambda: (self, first)


def inputs(count: int, value: float, device: torch.device = CPU) -> dict[str, Any]:
    values = torch.arange(2.0 * count, device=device).view(2, count) + value
    return {"values": values, "fixed": torch.full((3,), value, device=device), "count": count}


def run(recorded: graphs.Graphs, step: Sums, given: dict[str, Any]) -> graphs.Outputs | None:
    size = graphs.bucket(given["count"])
    return recorded((size, step.scale), given, step.prepare(given, size), given["values"].device)


def agrees(outputs: graphs.Outputs | None, given: dict[str, Any], scale: float) -> None:
    assert outputs is not None
    assert outputs["none"] is None
    assert torch.equal(outputs["sum"], given["values"].sum(1))
    assert torch.equal(outputs["copy"], given["fixed"] * scale)


def repeats(recorded: graphs.Graphs, device: torch.device) -> None:
    """Check what both recorders have to do."""
    step = Sums(2.0)
    assert run(recorded, step, inputs(5, 1.0, device)) is None
    assert step.calls == 0
    first = inputs(5, 1.0, device)
    outputs = run(recorded, step, first)
    agrees(outputs, first, 2.0)
    calls = step.calls
    # More entries and fewer, with other values. On a GPU the step itself is not called again.
    later = [(given, run(recorded, step, given)) for given in (inputs(64, 7.0, device), inputs(3, -2.0, device))]
    agrees(outputs, first, 2.0)
    for given, result in later:
        agrees(result, given, 2.0)
    assert len(recorded.kept) == 1
    if device.type == "cuda":
        assert step.calls == calls
    # Results belong to the caller.
    outputs["copy"].fill_(9.0)
    agrees(run(recorded, step, first), first, 2.0)
    # Beyond the bucket is another graph.
    larger = inputs(65, 3.0, device)
    assert run(recorded, step, larger) is None
    agrees(run(recorded, step, larger), larger, 2.0)
    assert len(recorded.kept) == 2
    agrees(run(recorded, step, first), first, 2.0)


def test_buckets_are_a_geometric_series() -> None:
    sizes = sorted({graphs.bucket(n) for n in range(3000)})
    assert sizes[0] == 64
    for smaller, larger in itertools.pairwise(sizes):
        assert graphs.bucket(smaller) == smaller
        assert graphs.bucket(smaller + 1) == larger
        assert larger <= 1.25 * smaller + 8


def test_a_step_is_recorded_when_it_repeats() -> None:
    repeats(graphs.Graphs(Playback()), CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_step_is_recorded_on_a_gpu() -> None:
    recorded = graphs.Graphs()
    repeats(recorded, torch.device("cuda"))
    assert recorded.failed is None


def test_inputs_stay_the_callers() -> None:
    recorded, step = graphs.Graphs(Playback()), Sums(1.0)
    given = inputs(5, 1.0)
    for tensor in (given["values"], given["fixed"]):
        tensor.requires_grad_()
    kept = {name: value.detach().clone() for name, value in given.items() if torch.is_tensor(value)}
    for _ in range(3):
        outputs = run(recorded, step, given)
    other = inputs(7, 2.0)
    run(recorded, step, other)
    for name, value in kept.items():
        assert torch.equal(given[name], value)
    # Nothing of the callers' autograd graphs is kept or returned.
    assert not outputs["sum"].requires_grad
    (entry,) = recorded.kept.values()
    assert not any(buffer.requires_grad for buffer in entry.buffers.values())


def test_the_least_recently_used_goes_first() -> None:
    playback = Playback()
    recorded = graphs.Graphs(playback, keep=2)
    given = inputs(4, 1.0)
    steps = {scale: Sums(scale) for scale in (1.0, 2.0, 3.0)}

    def meet(scale: float) -> graphs.Outputs | None:
        return run(recorded, steps[scale], given)

    for scale in (1.0, 2.0):
        meet(scale)
        agrees(meet(scale), given, scale)
    agrees(meet(1.0), given, 1.0)
    meet(3.0)
    agrees(meet(3.0), given, 3.0)
    assert [scale for _, scale in recorded.kept] == [1.0, 3.0]
    # A dropped graph is not recorded again at once, so that graphs do not keep displacing each other.
    assert meet(2.0) is None
    assert meet(2.0) is None
    for _ in range(graphs.MEETINGS_AGAIN):
        outputs = meet(2.0)
    agrees(outputs, given, 2.0)
    assert [scale for _, scale in recorded.kept] == [3.0, 2.0]
    assert playback.recorded == 4


def test_keys_met_once_are_forgotten_in_time() -> None:
    recorded, given = graphs.Graphs(Playback()), inputs(4, 1.0)
    for scale in range(2 * graphs.REMEMBERED):
        assert run(recorded, Sums(float(scale)), given) is None
    assert len(recorded.left) == graphs.REMEMBERED


def test_what_cannot_be_recorded_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(Playback):
        def record(self, run: Callable[[], graphs.Outputs]) -> tuple[Callable[[], None], graphs.Outputs]:
            raise RuntimeError("operation not permitted when stream is capturing")

    recorded, given = graphs.Graphs(Refusing()), inputs(4, 1.0)
    with caplog.at_level(logging.WARNING):
        for scale in (1.0, 1.0, 2.0, 2.0):
            if recorded.serves(CPU, 4):
                assert run(recorded, Sums(scale), given) is None
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "not permitted when stream is capturing" in caplog.text
    assert not recorded.serves(CPU, 4)


def test_a_graph_that_gives_something_else_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    class Forgetful(Playback):
        def record(self, run: Callable[[], graphs.Outputs]) -> tuple[Callable[[], None], graphs.Outputs]:
            _, outputs = super().record(run)
            return (lambda: outputs["sum"].zero_()), outputs

    recorded, given, step = graphs.Graphs(Forgetful()), inputs(4, 1.0), Sums(1.0)
    assert run(recorded, step, given) is None
    assert run(recorded, step, given) is None
    assert "other values of sum" in caplog.text
    assert not recorded.serves(CPU, 4)


def test_results_that_are_no_numbers_are_recorded() -> None:
    recorded, given, step = graphs.Graphs(Playback()), inputs(4, 1.0), Sums(1.0)
    given["fixed"][0] = torch.nan
    run(recorded, step, given)
    outputs = run(recorded, step, given)
    assert bool(outputs["copy"][0].isnan())
    assert recorded.failed is None


def test_the_largest_step_is_set_by_the_environment() -> None:
    recorded = graphs.Graphs(Playback())
    most = settings.Settings().cuda_graphs
    with settings.override(cuda_graphs=most):
        assert recorded.serves(CPU, most)
        assert not recorded.serves(CPU, most + 1)
    with settings.override(cuda_graphs=10):
        assert recorded.serves(CPU, 10)
        assert not recorded.serves(CPU, 11)
    with settings.override(cuda_graphs=0):
        assert not recorded.serves(CPU, 0)


def test_steps_are_recorded_on_a_gpu_only() -> None:
    assert not graphs.Graphs().serves(CPU, 1)


def test_errors_of_the_step_itself_are_raised() -> None:
    def broken(buffers: dict[str, Tensor]) -> graphs.Outputs:
        raise ValueError("no table for this pair")

    recorded, given = graphs.Graphs(Playback()), {"fixed": torch.ones(1)}
    assert recorded("key", given, lambda: (broken, given), CPU) is None
    with pytest.raises(ValueError, match="no table"):
        recorded("key", given, lambda: (broken, given), CPU)
    assert recorded.failed is None
    assert not recorded.kept
