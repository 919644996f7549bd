"""Lines that several commands print, and where they go."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gaq.untyped import Document

__all__ = ["Say", "gate_lines", "metric_lines", "say_undeployable", "say_unfused", "speaker", "use_lines"]

Say = Callable[[str], object]
"""Takes a line for the user."""


def speaker(as_json: bool) -> Say:
    """Return what takes the lines of a command: ``print``, or nothing where JSON takes their place."""
    return (lambda line: None) if as_json else print


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


def use_lines(uses: Document) -> str:
    """The number behind each verdict on a use, as a table; what those that were not shown need stands in the page."""
    from gaq.checks.uses import use_rows
    from gaq.reporting import format_table
    from gaq.reporting.tables import format_number

    rows = [
        {
            "use": use,
            "value": format_number(value),
            "bound": f"<= {format_number(bound)}",
            "unit": unit,
            "verdict": word,
            "what": what,
        }
        for use, word, value, bound, unit, what in use_rows(uses)
        if value is not None
    ]
    return format_table(rows, ["use", "value", "bound", "unit", "verdict", "what"]) if rows else ""


def metric_lines(report: Document) -> str:
    """The metrics as a table; a table for each head where the model has several."""
    from gaq.reporting.tables import format_table, metric_rows

    def table(metrics: Document) -> str:
        names = ["metric", "unit", "model", "reference"]
        rows = [dict(zip(names, row, strict=True)) for row in metric_rows(metrics["model"], metrics["reference"])]
        return format_table(rows, ["metric", "model", "reference", "unit"])

    if not report["heads"]:
        return table(report)
    return "\n".join(f"head {head}\n{table(metrics)}" for head, metrics in report["heads"].items())


def say_unfused(say: Say, unfused: Mapping[str, str]) -> None:
    """Say which parts of a quantized model the fused kernels do not serve."""
    for name, reason in unfused.items():
        say(f"not on the fast path: {name}: {reason}")


def say_undeployable(say: Say, reason: str | None) -> None:
    """Say why `gaq deploy` refuses a model, if it does."""
    if reason is not None:
        say(f"`gaq deploy` refuses this model: {reason}")
