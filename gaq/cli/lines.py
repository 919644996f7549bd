"""Lines that several commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gaq.untyped import Document

if TYPE_CHECKING:
    import torch

    from gaq.adapter import Adapter

__all__ = ["gate_lines", "metric_lines", "print_unfused"]


def gate_lines(gates: dict[str, Document]) -> str:
    """The measured gates as a table, and what was not measured."""
    from gaq.reporting import format_table, gate_rows, summary, unmeasured

    rows = []
    for row in gate_rows(gates):
        word = row["verdict"]
        printed = word if word != "fail" else "fails (printed only)" if row["enforced"] else "FAIL"
        rows.append({**row, "verdict": printed})
    lines = [format_table(rows, ["gate", "value", "bound", "unit", "verdict", "what"]), summary(gates)]
    return "\n".join([*lines, *(f"  not measured: {name}: {needs}" for name, needs in unmeasured(gates).items())])


def metric_lines(report: Document) -> str:
    from gaq.reporting.tables import format_table, metric_rows

    rows = metric_rows(report["model"], report["reference"])
    names = ["metric", "unit", "model", "reference"]
    return format_table([dict(zip(names, row, strict=True)) for row in rows], ["metric", "model", "reference", "unit"])


def print_unfused(adapter: Adapter, model: torch.nn.Module) -> None:
    """Say at once which parts of a quantized model the fused kernels do not serve."""
    for name, reason in adapter.unfused(model).items():
        print(f"not on the fast path: {name}: {reason}")
